"""Whatever a reward does to its process, it costs that sample and no other, and nothing of it stays."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.rl.metrics import Sum
from posttrain.rl.rewards import Rubric, reward
from posttrain.rl.rewards.process_tree import children
from posttrain.rl.types import Completion, Prompt, RolloutGroup

from .test_pool import gone, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what a process started is known from /proc")

MEMORY_MIB = 384


def good(folder: Path) -> float:
    return 1.0


def sleeps(folder: Path) -> float:
    while True:
        time.sleep(1)


def blocks_every_signal(folder: Path) -> float:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    return sleeps(folder)


def is_stuck_in_c(folder: Path) -> float:
    return float(sum(range(10**15)))


def stops_itself(folder: Path) -> float:
    os.kill(os.getpid(), signal.SIGSTOP)
    return 1.0


def prints_without_end(folder: Path) -> float:
    while True:
        os.write(1, b"x" * (1 << 20))


def waits_at_a_socket(folder: Path) -> float:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.accept()
    return 1.0


def exits(folder: Path) -> float:
    os._exit(0)


def leaves_by_sys_exit(folder: Path) -> float:
    sys.exit(3)


def crashes(folder: Path) -> float:
    return float(ctypes.string_at(0)[0])


def allocates_at_once(folder: Path) -> float:
    return float(len(bytearray(10 << 30)))


def allocates_in_shared_memory(folder: Path) -> float:
    memory = mmap.mmap(-1, 10 << 30)
    for position in range(0, 10 << 30, mmap.PAGESIZE):
        memory[position] = 1
    return 1.0


def allocates_in_a_child(folder: Path) -> float:
    if os.fork() == 0:
        allocates_in_shared_memory(folder)
    return sleeps(folder)


def _orphan(folder: Path) -> None:
    """A process of its own session whose parent is gone."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            with (folder / "pids").open("a") as pids:
                pids.write(f"{os.getpid()}\n")
            os.write(writer, b"!")
            time.sleep(600)
        os._exit(0)
    os.wait()
    os.read(reader, 1)


def forks_and_returns(folder: Path) -> float:
    _orphan(folder)
    _orphan(folder)
    return 1.0


def forks_and_exits(folder: Path) -> float:
    _orphan(folder)
    os._exit(0)


def forks_and_sleeps(folder: Path) -> float:
    _orphan(folder)
    return sleeps(folder)


def forks_without_end(folder: Path) -> float:
    while True:
        os.fork()


def disowns_its_children(folder: Path) -> float:
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER off
    _orphan(folder)
    os._exit(0)


def closes_everything(folder: Path) -> float:
    os.closerange(0, 4096)
    return 1.0


def writes_into_every_descriptor(folder: Path) -> float:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b'\x00\x00\x00\x13["returned", 1, 9.0]')
        except OSError:
            continue
    return sleeps(folder)


def returns_too_much(folder: Path) -> Any:
    return "x" * (64 << 20)


def returns_something_that_runs_when_unpickled(folder: Path) -> Any:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(folder / "unpickled"),))

    return Trap()


def raises_what_cannot_be_shown(folder: Path) -> float:
    class Own(Exception):
        def __init__(self, one: int, two: threading.Lock) -> None:
            self.two = two

        def __str__(self) -> str:
            raise ValueError

    raise Own(1, threading.Lock())


def recurses(folder: Path) -> float:
    return recurses(folder)


def kills_what_started_it(folder: Path) -> float:
    os.kill(os.getppid(), signal.SIGKILL)
    return sleeps(folder)


def leaves_an_alarm(folder: Path) -> float:
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    return 1.0


def prints_gigabytes(folder: Path) -> float:
    for _ in range(4096):
        os.write(1, b"x" * (1 << 20))
        os.write(2, b"x" * (1 << 20))
    return 1.0


TIMEOUTS: list[Callable[[Path], float]] = [
    sleeps,
    blocks_every_signal,
    is_stuck_in_c,
    stops_itself,
    prints_without_end,
    waits_at_a_socket,
    forks_and_sleeps,
]
ERRORS: list[Callable[[Path], float]] = [
    exits,
    leaves_by_sys_exit,
    crashes,
    allocates_at_once,
    allocates_in_shared_memory,
    allocates_in_a_child,
    forks_and_exits,
    forks_without_end,
    disowns_its_children,
    closes_everything,
    writes_into_every_descriptor,
    returns_too_much,
    returns_something_that_runs_when_unpickled,
    raises_what_cannot_be_shown,
    recurses,
    kills_what_started_it,
]
FORGIVEN: list[Callable[[Path], float]] = [good, forks_and_returns, leaves_an_alarm, prints_gigabytes]


@reward(timeout=1.0, memory_mib=MEMORY_MIB, on_error="zero")
def quick(completion: str, folder: str) -> float:
    return float(globals()[completion](Path(folder)))


@reward(timeout=60.0, memory_mib=MEMORY_MIB, on_error="zero")
def patient(completion: str, folder: str) -> float:
    """For what must end by itself, or by the memory it takes."""
    return float(globals()[completion](Path(folder)))


@pytest.fixture(scope="module")
def rubrics() -> Iterator[dict[str, Rubric]]:
    made = {"quick": Rubric([quick]), "patient": Rubric([patient])}
    yield made
    for rubric in made.values():
        rubric.close()
    assert not [pid for pid in children(os.getpid()) if b"pool_keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def score(rubric: Rubric, texts: list[str], folder: Path) -> RolloutGroup:
    group = Prompt("0-0", "", {"folder": str(folder)}), [Completion((), (), text, "stop", 0) for text in texts]
    [scored] = asyncio.run(rubric.score([group]))
    return scored


@pytest.mark.parametrize(
    ("act", "failure"),
    [(act, "timeout") for act in TIMEOUTS] + [(act, "error") for act in ERRORS] + [(act, None) for act in FORGIVEN],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_one_sample_is_what_it_costs(
    act: Callable[[Path], float], failure: str | None, rubrics: dict[str, Rubric], tmp_path: Path
) -> None:
    name = "quick" if failure == "timeout" else "patient"
    rubric = rubrics[name]
    scored = score(rubric, ["good", act.__name__, "good"], tmp_path)
    # What kills the keeper of all workers may cost the calls of its neighbours; they are counted like its own.
    if act is not kills_what_started_it:
        assert [rollout.reward for rollout in scored.rollouts] == [1.0, 0.0 if failure else 1.0, 1.0]
        assert [rollout.failures.get(name) for rollout in scored.rollouts] == [None, failure, None]
    assert scored.rollouts[1].failures.get(name) == failure
    again = score(rubric, ["good", "good"], tmp_path)
    assert [(rollout.reward, dict(rollout.failures)) for rollout in again.rollouts] == [(1.0, {})] * 2
    assert not (tmp_path / "unpickled").exists()
    if act in (forks_and_returns, forks_and_exits, forks_and_sleeps, disowns_its_children):
        pids = [int(line) for line in (tmp_path / "pids").read_text().splitlines()]
        wait_until(lambda: all(map(gone, pids)))


def test_all_at_once_in_one_group(rubrics: dict[str, Rubric], tmp_path: Path) -> None:
    """Every kind of failure side by side with good samples, in one group, through the same few workers."""
    acts = [act.__name__ for act in (*TIMEOUTS[:3], exits, crashes, closes_everything, returns_too_much)]
    texts = [text for act in acts for text in (act, "good")]
    scored = score(rubrics["quick"], texts, tmp_path)
    assert [rollout.reward for rollout in scored.rollouts] == [0.0, 1.0] * len(acts)
    metrics = rubrics["quick"].metrics([scored])
    assert metrics["reward/quick/timeouts"] == Sum(3) and metrics["reward/quick/errors"] == Sum(4)
