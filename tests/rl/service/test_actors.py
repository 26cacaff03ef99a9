"""Sampler and trainer as Ray actors, on a Ray started here: the same figures, our own errors, nothing left running."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path

import pytest
import ray

from posttrain import rl
from posttrain.rl.errors import ActorDied, CheckpointError, ConfigError, EngineError, RewardError
from posttrain.rl.service.actors import ActorCaller, Actors
from posttrain.rl.service.handles import SamplerHandle
from posttrain.rl.service.local import ThreadCaller
from tests.e2e.forks import wait_until

from .tiny_runs import ROWS, reproducible, settings, spread


class Target:
    """What an actor is asked to hold."""

    def __init__(self, fail: bool = False, closing: Path | None = None) -> None:
        if fail:
            raise ConfigError("no such model: set model.name")
        self.calls = 0
        self.closing = closing

    def close(self) -> None:
        if self.closing is not None:
            with self.closing.open("a") as file:
                file.write("1")

    def count(self, step: int, *, times: int = 1) -> int:
        self.calls += step * times
        return self.calls

    def fail_ours(self) -> None:
        raise CheckpointError("the adapter does not fit; start a new run")

    def fail_theirs(self) -> None:
        raise ZeroDivisionError("a bug")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def drip(self, folder: Path) -> Iterator[int]:
        """Yields one item, then waits to be killed."""
        yield 1
        (folder / "waiting").touch()
        time.sleep(600)

    def count_to(self, most: int, folder: Path) -> Iterator[int]:
        """Waits before each item but the first until the one before was taken note of; tells how it ended."""
        try:
            for item in range(most):
                (folder / "drawn").write_text(str(item + 1))
                yield item
                if item == 0:
                    wait_until((folder / "go_on").exists, "the end of the pause")
        finally:
            (folder / "closed").touch()

    def stream(self, prompts: list[None], n: int, params: None) -> Iterator[tuple[int, list[None]]]:
        for index in range(len(prompts)):
            time.sleep(0.01)
            self.calls += 1
            yield index, [None] * n

    def place(self) -> tuple[int, str | None]:
        return os.getpid(), os.environ.get("OMP_NUM_THREADS")


@pytest.fixture(scope="module")
def session():
    """One Ray for the tests of this file that do not start their own."""
    assert not ray.is_initialized()
    with Actors(1, gpu=False, cpu_threads=3).reserved() as actors:
        yield actors
    assert not ray.is_initialized()


async def build(actors: Actors, name: str, make) -> ActorCaller:
    caller = actors.spawn(name, 0, ())
    await caller.make(make)
    return caller


async def test_calls_reach_one_object_in_another_process(session) -> None:
    caller = await build(session, "sampler", Target)
    assert [await caller("count", 2), await caller("count", 5, times=2)] == [2, 12]
    pid, threads = await caller("place")
    assert pid != os.getpid() and threads == "3"
    await caller.close()
    await caller.close()


async def test_our_exceptions_arrive_as_themselves(session) -> None:
    caller = await build(session, "trainer", Target)
    with pytest.raises(CheckpointError) as caught:
        await caller("fail_ours")
    assert type(caught.value) is CheckpointError
    assert str(caught.value) == "the adapter does not fit; start a new run"
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await caller("fail_theirs")
    assert await caller("count", 1) == 1, "the actor goes on"
    await caller.close()


async def test_so_do_those_of_a_constructor(session) -> None:
    with pytest.raises(ConfigError) as caught:
        await build(session, "trainer", partial(Target, fail=True))
    assert type(caught.value) is ConfigError and str(caught.value) == "no such model: set model.name"


async def test_closing_closes_the_object_then_ends_the_process(session, tmp_path) -> None:
    caller = await build(session, "trainer", partial(Target, closing=tmp_path / "closed"))
    pid, _ = await caller("place")
    await caller.close()
    assert (tmp_path / "closed").read_text() == "1"
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), "the end of the actor's process")
    await caller.close()


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


async def test_a_process_that_dies_is_named(session) -> None:
    caller = await build(session, "trainer", Target)
    await caller("count", 1)
    for method in ("die", "count"):
        with pytest.raises(ActorDied, match="the trainer's process died") as caught:
            await caller(method, *([1] if method == "count" else []))
        assert caught.value.actor == "trainer"
    await caller.close()


async def test_a_process_killed_in_the_middle_of_a_stream(session, tmp_path) -> None:
    caller = await build(session, "sampler", Target)
    items = caller.stream("drip", tmp_path)
    assert await anext(items) == 1
    wait_until((tmp_path / "waiting").exists, "the pause after the first item")
    os.kill(caller.home.pid, signal.SIGKILL)
    with pytest.raises(ActorDied, match="the sampler's process died") as caught:
        await asyncio.wait_for(anext(items), 30)
    assert caught.value.actor == "sampler"
    assert not await caller.alive()
    await caller.close()


async def abandoned(caller: ThreadCaller | ActorCaller, folder: Path) -> None:
    """A stream that is closed after its first item ends at the second; the object goes on."""
    items = caller.stream("count_to", 50, folder)
    assert await anext(items) == 0
    closing = asyncio.create_task(items.aclose())
    await asyncio.sleep(0.5)  # for a message to another process
    (folder / "go_on").touch()
    await closing
    assert await caller("count", 1) == 1
    assert (folder / "closed").exists()
    assert (folder / "drawn").read_text() == "2"
    items = caller.stream("count_to", 50, folder)
    assert [item async for item in items] == list(range(50)), "the next stream is not cancelled"


async def test_an_abandoned_stream_ends_at_the_next_item(session, tmp_path) -> None:
    caller = await build(session, "sampler", Target)
    await abandoned(caller, tmp_path)
    await caller.close()


async def test_an_abandoned_stream_in_this_process_ends_at_the_next_item(tmp_path) -> None:
    caller = ThreadCaller("sampler", 1)
    await caller.make(Target)
    await abandoned(caller, tmp_path)
    await caller.close()


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("where", ["actors", "threads"])
async def test_a_consumer_that_fails_or_is_cancelled_stops_the_sampler(where, cancelled, session) -> None:
    caller = session.spawn("sampler", 0, ()) if where == "actors" else ThreadCaller("sampler", 1)
    await caller.make(Target)
    arrived = asyncio.Event()

    async def consume() -> None:
        async with aclosing(SamplerHandle(caller).stream([None] * 500, 1, None)) as stream:
            async for index, _ in stream:
                if index == 3:
                    arrived.set()
                    if not cancelled:
                        raise RewardError("a bug")

    task = asyncio.create_task(consume())
    await asyncio.wait_for(arrived.wait(), 30)
    if cancelled:
        task.cancel()
    with pytest.raises(asyncio.CancelledError if cancelled else RewardError):
        await task
    assert 4 <= await caller("count", 0) < 250
    await caller.close()


async def test_a_process_killed_before_it_settles(session) -> None:
    caller = session.spawn("trainer", 0, ("torch",))
    pid = await caller._actor.__ray_call__.remote(lambda _: os.getpid())
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ActorDied, match="the trainer's process died"):
        await caller.make(Target)
    await caller.close()


async def test_more_pairs_than_there_are_gpus(session) -> None:
    actors = Actors(2, gpu=True, cpu_threads=1)
    with pytest.raises(EngineError, match=r"gpus = 2, but Ray sees 0: lower gpus"), actors.reserved():
        pass
    assert ray.is_initialized()


async def test_a_ray_that_was_there_is_left_running(session) -> None:
    with Actors(1, gpu=False, cpu_threads=1).reserved():
        pass
    assert ray.is_initialized()


def train(folder, **changes) -> rl.RunResult:
    changes = {"dataset": ROWS, "rewards": [spread], "output_dir": str(folder), **changes}
    return rl.train(**settings(**changes))


def test_a_run_in_actors_equals_the_embedded_one_and_stops_the_ray_it_started(tmp_path) -> None:
    """Last: the Ray of this file's other tests is stopped first."""
    ray.shutdown()
    mode = {"max_staleness": 1, "eval_dataset": ROWS[:2], "evaluation": {"every": 2, "samples": 2}}
    in_actors = train(tmp_path / "actors", placement="ray", **mode)
    assert not ray.is_initialized()
    embedded = train(tmp_path / "embedded", **mode)
    assert reproducible(in_actors.metrics) == reproducible(embedded.metrics)
    ours, theirs = (result.checkpoint / "adapter_model.safetensors" for result in (in_actors, embedded))
    assert ours.read_bytes() == theirs.read_bytes()
