"""A pool gives what the function gives, from any thread and loop, sends what it is given, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.rl.errors import ConfigError, PosttrainError
from posttrain.rl.rewards.pool import MAX_ARGUMENT_BYTES, Crashed, Failed, Pool, TimedOut
from posttrain.rl.rewards.process_tree import children, descendants

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(workers=2)
    yield pool
    pool.close()


def add(a: Any, b: Any = 1) -> Any:
    return a + b


def same(value: Any) -> Any:
    return value


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def processes(pool: Pool) -> list[int]:
    assert pool._dispatcher is not None and pool._dispatcher._keeper is not None
    keeper = pool._dispatcher._keeper.pid
    return [keeper, *descendants(keeper)]


class Times:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, a: int) -> int:
        return self.factor * a


@pytest.mark.parametrize(
    ("function", "arguments", "value"),
    [
        (add, {"a": 2, "b": 3}, 5),
        (partial(add, b=10), {"a": 2}, 12),
        (Times(4), {"a": 3}, 12),
        (lambda a: a * 2, {"a": "x"}, "xx"),
        (same, {"value": None}, None),
        (same, {"value": [1, 2.5, None, True]}, [1, 2.5, None, True]),
        (same, {"value": float("inf")}, float("inf")),
        (same, {"value": np.float32(0.5)}, 0.5),
        (same, {"value": np.array([1.0, 2.0])}, [1.0, 2.0]),
        (same, {"value": [np.int64(3)]}, [3]),
        (same, {"value": "\ud800 ✓"}, "\ud800 ✓"),
        (len, {}, None),
    ],
)
def test_what_goes_in_and_out(pool: Pool, function: Callable[..., Any], arguments: dict[str, Any], value: Any) -> None:
    if function is len:
        with pytest.raises(Failed) as caught:
            pool.ask(function, arguments, timeout_s=30)
        assert caught.value.kind == "TypeError"
        return
    found = pool.ask(function, arguments, timeout_s=30)
    assert found == value and type(found) is type(value)


def test_a_closure_and_what_it_holds_go_along(pool: Pool) -> None:
    factor = 7

    class Own:
        value = 3

    def scaled(own: Own) -> int:
        return own.value * factor

    assert pool.ask(scaled, {"own": Own()}, timeout_s=30) == 21


def test_a_function_is_sent_once_and_keeps_its_state_in_the_worker() -> None:
    def count(seen: list[int] = []) -> int:  # noqa: B006
        seen.append(1)
        return len(seen)

    pool = Pool(workers=1)
    try:
        assert [pool.ask(count, {}, timeout_s=30) for _ in range(3)] == [1, 2, 3]
    finally:
        pool.close()


def test_an_exception_comes_back_in_words(pool: Pool) -> None:
    def divides(a: int) -> float:
        return a / 0

    with pytest.raises(Failed) as caught:
        pool.ask(divides, {"a": 1}, timeout_s=30)
    assert (caught.value.kind, caught.value.message) == ("ZeroDivisionError", "division by zero")
    assert "return a / 0" in caught.value.trace or "in divides" in caught.value.trace


def test_a_value_that_is_no_plain_data_is_an_error_and_not_unpickled_here(pool: Pool) -> None:
    with pytest.raises(Failed, match="returned PosixPath"):
        pool.ask(lambda: Path("x"), {}, timeout_s=30)


def test_what_cannot_be_sent_is_said_before_any_process_starts() -> None:
    pool = Pool()
    lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"the function .*locked.* cannot be sent to a process"):
        pool.ask(locked_by(lock), {}, timeout_s=1)
    with pytest.raises(ConfigError, match=r"the arguments of same cannot be sent"):
        pool.ask(same, {"value": lock}, timeout_s=1)
    with pytest.raises(ConfigError, match=r"take 65 MiB.*ask for fewer columns"):
        pool.ask(same, {"value": b"x" * (MAX_ARGUMENT_BYTES + (1 << 20))}, timeout_s=1)
    assert pool._dispatcher is None


def locked_by(lock: Any) -> Callable[[], bool]:
    def locked() -> bool:
        return lock.locked()

    return locked


def test_arguments_larger_than_a_socket_holds(pool: Pool) -> None:
    assert pool.ask(len_of, {"text": "x" * 10_000_000}, timeout_s=60) == 10_000_000


def len_of(text: str) -> int:
    return len(text)


async def test_many_calls_at_once_each_get_their_own_answer(pool: Pool) -> None:
    numbers = list(range(500))
    random.Random(0).shuffle(numbers)
    assert await asyncio.gather(*(pool.call(add, {"a": n}, timeout_s=60) for n in numbers)) == [n + 1 for n in numbers]


def test_threads_with_event_loops_of_their_own_share_a_pool(pool: Pool) -> None:
    def loop_of_its_own(n: int) -> list[int]:
        async def several() -> list[int]:
            return await asyncio.gather(*(pool.call(add, {"a": n, "b": k}, timeout_s=60) for k in range(20)))

        return asyncio.run(several())

    with ThreadPoolExecutor(4) as executor:
        for n, found in enumerate(executor.map(loop_of_its_own, range(0, 400, 100))):
            assert found == [100 * n + k for k in range(20)]


async def test_calls_run_side_by_side_and_no_more_than_there_are_workers() -> None:
    pool = Pool(workers=2)
    try:
        await asyncio.gather(*(pool.call(same, {"value": k}, timeout_s=30) for k in range(2)))
        pids = await asyncio.gather(*(pool.call(nap, {"seconds": 0.3}, timeout_s=30) for _ in range(4)))
        assert len(set(pids)) == 2 and os.getpid() not in pids
    finally:
        pool.close()


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


async def test_a_time_limit_holds_for_its_call_alone(pool: Pool) -> None:
    began = time.monotonic()
    results = await asyncio.gather(
        pool.call(nap, {"seconds": 60}, timeout_s=0.5),
        pool.call(same, {"value": 1}, timeout_s=30),
        return_exceptions=True,
    )
    assert isinstance(results[0], TimedOut) and results[1] == 1
    assert 0.5 <= time.monotonic() - began < 20


def test_loading_a_function_is_no_part_of_its_time() -> None:
    pool = Pool(workers=1)
    try:
        assert pool.ask(SlowToLoad(), {}, timeout_s=0.5) == "called"
    finally:
        pool.close()


class SlowToLoad:
    def __setstate__(self, state: Any) -> None:
        time.sleep(1.0)

    def __getstate__(self) -> dict[str, int]:
        return {"any": 1}

    def __call__(self) -> str:
        return "called"


def test_a_function_that_cannot_be_loaded_says_why(pool: Pool) -> None:
    with pytest.raises(Failed, match="ValueError: not here"):
        pool.ask(NotLoadable(), {}, timeout_s=30)
    assert pool.ask(add, {"a": 1}, timeout_s=30) == 2


class NotLoadable:
    def __getstate__(self) -> dict[str, int]:
        return {"any": 1}

    def __setstate__(self, state: Any) -> None:
        raise ValueError("not here")

    def __call__(self) -> None: ...


def test_functions_of_a_file_that_no_path_leads_to(pool: Pool, tmp_path: Path) -> None:
    from posttrain.rl.rewards.references import import_function

    (tmp_path / "neighbour_of_the_pool.py").write_text("BONUS = 40\n")
    file = tmp_path / "my_rewards.py"
    file.write_text("from neighbour_of_the_pool import BONUS\n\ndef bonus(a):\n    return a + BONUS\n")
    assert pool.ask(import_function(f"{file}:bonus"), {"a": 2}, timeout_s=30) == 42


@linux
async def test_a_cancelled_call_gives_its_worker_back() -> None:
    pool = Pool(workers=1)
    try:
        call = asyncio.ensure_future(pool.call(nap, {"seconds": 600}, timeout_s=600))
        while pool._dispatcher is None or not any(
            w.deadline and not w.loading for w in pool._dispatcher._workers.values()
        ):
            await asyncio.sleep(0.01)
        call.cancel()
        assert await pool.call(add, {"a": 1}, timeout_s=30) == 2
    finally:
        pool.close()


@linux
def test_close_leaves_no_process_and_may_be_repeated() -> None:
    before = set(children(os.getpid()))
    pool = Pool(workers=2)
    pool.close()
    pool = Pool(workers=2)
    assert pool.ask(add, {"a": 1}, timeout_s=30) == 2
    pids = processes(pool)
    assert len(pids) == 2
    pool.close()
    pool.close()
    assert all(gone(pid) for pid in pids) and set(children(os.getpid())) <= before
    with pytest.raises(RuntimeError, match="closed"):
        pool.ask(add, {"a": 1}, timeout_s=1)


@linux
def test_a_forgotten_pool_ends_too() -> None:
    pool = Pool(workers=1)
    pool.ask(add, {"a": 1}, timeout_s=30)
    pids = processes(pool)
    del pool
    gc.collect()
    wait_until(lambda: all(map(gone, pids)))


async def test_calls_under_way_fail_when_the_pool_is_closed() -> None:
    pool = Pool(workers=1)
    calls = [asyncio.ensure_future(pool.call(nap, {"seconds": 600}, timeout_s=600)) for _ in range(3)]
    await asyncio.sleep(0.5)
    await asyncio.to_thread(pool.close)
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(result, Crashed)


@linux
def test_processes_die_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Killed so that nothing of it can clean up."""
    import subprocess

    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from posttrain.rl.rewards.pool import Pool\n"
        "def spawn():\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        signal.pause()\n"
        "    signal.pause()\n"
        "pool = Pool(workers=1)\n"
        "pool._submit(spawn, {}, 600.0, None)\n"
        "from posttrain.rl.rewards.process_tree import descendants\n"
        "import time\n"
        "while len(descendants(os.getpid())) < 3: time.sleep(0.01)\n"
        "print(*descendants(os.getpid()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    pids = [int(pid) for pid in run.stdout.split()]
    assert run.returncode == -signal.SIGKILL and len(pids) == 3, run.stderr
    wait_until(lambda: all(map(gone, pids)))


@linux
def test_a_keeper_that_was_killed_is_replaced() -> None:
    pool = Pool(workers=1)
    try:
        assert pool.ask(add, {"a": 1}, timeout_s=30) == 2
        first = processes(pool)
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: all(map(gone, first)))
        wait_until(lambda: pool._dispatcher is not None and pool._dispatcher._keeper is None)
        assert pool.ask(add, {"a": 1}, timeout_s=30) == 2
    finally:
        pool.close()


def test_where_no_process_can_be_started_the_caller_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(workers=1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(PosttrainError, match="could not be started"):
        pool.ask(add, {"a": 1}, timeout_s=30)
    monkeypatch.undo()
    assert pool.ask(add, {"a": 1}, timeout_s=30) == 2
    pool.close()


@linux
def test_a_forked_copy_of_this_process_starts_a_pool_of_its_own(pool: Pool) -> None:
    assert pool.ask(add, {"a": 1}, timeout_s=30) == 2
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(pool.ask(add, {"a": 40, "b": 2}, timeout_s=30)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        assert answers.read() == "42"
    os.waitpid(pid, 0)
    assert pool.ask(add, {"a": 1}, timeout_s=30) == 2
