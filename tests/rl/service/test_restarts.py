"""A sampler or trainer that dies in mid-run: brought back, the run goes on, and nothing in it shows.

Hosts of this process stand in for actors: from its fault on a host only says that it is dead. Real processes are
killed in ``tests/e2e/test_restarts.py``.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from posttrain.rl.config import load
from posttrain.rl.errors import ActorDied, EngineError, OutOfMemory
from posttrain.rl.run_dir import RunDir
from posttrain.rl.service import placement, run
from posttrain.rl.service.handles import SamplerOutOfMemory
from posttrain.rl.service.restarts import Restarts
from tests.e2e.test_kill_and_resume import CONFIG, MODES, assert_same_run


@dataclass
class Fault:
    """What happens at the ``call``-th call of a method, counted over all hosts: before it, or after it was done."""

    method: str
    call: int
    after: bool = False
    error: type[Exception] = ActorDied


@dataclass
class FakeHosts:
    """``Hosts`` whose objects live in this process."""

    faults: list[Fault]
    address: str = "127.0.0.1"
    calls: Counter[str] = field(default_factory=Counter)
    built: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def spawn(self, name, pair, imports):
        return FakeHost(self, name)


class FakeHost:
    def __init__(self, hosts: FakeHosts, name: str) -> None:
        self.name, self.hosts, self.dead = name, hosts, False

    async def make(self, make) -> None:
        self._fault("make", after=False)
        self.target = make()
        self.hosts.built.append(self.name)
        self.hosts.calls[f"{self.name}.make"] += 1

    async def alive(self) -> bool:
        return not self.dead

    async def __call__(self, method, *args, **kwargs):
        self._fault(method, after=False)
        result = getattr(self.target, method)(*args, **kwargs)
        self._fault(method, after=True)
        self.hosts.calls[f"{self.name}.{method}"] += 1
        return result

    async def stream(self, method, *args):
        self._fault(method, after=False)
        for item in getattr(self.target, method)(*args):
            yield item
            self._fault(method, after=True)
        self.hosts.calls[f"{self.name}.{method}"] += 1

    async def close(self) -> None:
        self.hosts.closed.append(self.name)

    def _fault(self, method: str, *, after: bool) -> None:
        if self.dead:
            raise ActorDied(f"the {self.name}'s process died", self.name)
        for fault in self.hosts.faults:
            count = self.hosts.calls[f"{self.name}.{method}"] + 1
            if (fault.method, fault.call, fault.after) == (f"{self.name}.{method}", count, after):
                self.hosts.faults.remove(fault)
                if fault.error is not ActorDied:
                    raise fault.error("the cache does not fit")
                self.dead = True
                raise ActorDied(f"the {self.name}'s process died", self.name)


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, RunDir]:
    """One run of each mode that nobody touched."""
    folder = tmp_path_factory.mktemp("references")
    return {mode: RunDir(train(folder, mode).run_dir) for mode in MODES}


def train(folder: Path, mode: str, *overrides: str) -> run.RunResult:
    options = [*(option for option in MODES[mode] if option != "--set"), *overrides]
    config = load(CONFIG, [f"output_dir={folder}", f"run_name={mode}", "logging.console=off", *options])
    return run.train(config, base=CONFIG.parent)


def broken(monkeypatch, *faults: Fault) -> FakeHosts:
    hosts = FakeHosts(list(faults))

    @contextmanager
    def fake(blueprint):
        yield hosts

    monkeypatch.setattr(placement, "_hosts", fake)
    return hosts


def warnings_of(result: RunDir) -> list[str]:
    lines = [line.split(" ", 1)[1] for line in result.messages_file.read_text().splitlines()]
    return [line for line in lines if line.startswith("warning: ")]


MOMENTS = {
    # Two epochs a step: calls 1 to 12 of forward_backward are the warm start's, 13 and 14 step 1's, and so on.
    "the warm start": ("trainer.forward_backward", 5),
    "the first publication": ("trainer.publish_adapter", 1),
    "between the two updates of step 1": ("trainer.forward_backward", 14),
    "the optimizer step of step 3": ("trainer.optim_step", 17),
    "old logprobs": ("trainer.score", 3),
    "the second checkpoint": ("trainer.save", 3),
    "after a checkpoint's files": ("trainer.save", 3, True),
    "the first samples": ("sampler.stream", 1),
    "in the middle of a batch": ("sampler.stream", 6, True),
    "weights arriving": ("sampler.load_adapter", 4),
    "waking": ("sampler.wake", 1),
    "the last look at the base": ("trainer.checksum", 5),
}


OVERLAPPED = ("the optimizer step of step 3", "in the middle of a batch", "weights arriving", "the second checkpoint")


@pytest.mark.parametrize(
    ("moment", "mode"),
    [*((moment, "on_policy") for moment in MOMENTS), *((moment, "overlapped") for moment in OVERLAPPED)],
)
def test_killed_once(moment: str, mode: str, references, monkeypatch, tmp_path) -> None:
    hosts = broken(monkeypatch, Fault(*MOMENTS[moment]))
    result = RunDir(train(tmp_path, mode, "placement=ray").run_dir)
    assert not hosts.faults, "it was killed"
    assert_same_run(result, references[mode], moment)
    dead = MOMENTS[moment][0].partition(".")[0]
    again = ["trainer"] if dead == "trainer" else ["sampler", "trainer"]
    assert hosts.built == ["sampler", "trainer", *again] and sorted(hosts.closed) == sorted(hosts.built)
    [warning] = warnings_of(result)
    assert f"the {dead}'s process died" in warning and "restart 1 of 3" in warning


def test_killed_again_and_again(references, monkeypatch, tmp_path) -> None:
    """Also while it is being brought back."""
    faults = [
        Fault("trainer.forward_backward", 16),
        Fault("trainer.make", 2),
        Fault("sampler.stream", 9, True),
        Fault("trainer.load", 2),
        Fault("sampler.make", 2),
        Fault("trainer.optim_step", 24),
    ]
    hosts = broken(monkeypatch, *faults)
    result = RunDir(train(tmp_path, "on_policy", "placement=ray", "max_restarts=4").run_dir)
    assert not hosts.faults
    assert_same_run(result, references["on_policy"])
    assert len(warnings_of(result)) == 6


def test_one_failure_too_many_ends_the_run_with_the_numbers(references, monkeypatch, tmp_path) -> None:
    hosts = broken(monkeypatch, *(Fault("trainer.optim_step", 19) for _ in range(3)))
    with pytest.raises(ActorDied) as caught:
        train(tmp_path, "on_policy", "placement=ray", "max_restarts=2")
    assert str(caught.value) == (
        "the trainer's process died; that is failure 3 in step 4, and max_restarts = 2; "
        f"go on later with: posttrain train --resume {tmp_path}/on_policy"
    )
    assert caught.value.actor == "trainer"
    assert not hosts.faults and sorted(hosts.closed[-2:]) == ["sampler", "trainer"]
    monkeypatch.undo()
    stored = load(tmp_path / "on_policy" / "config.toml", ["placement=embedded"])
    run.train(stored, resume=tmp_path / "on_policy", base=CONFIG.parent)
    assert_same_run(RunDir(tmp_path / "on_policy"), references["on_policy"])


def test_no_restarts_at_all(monkeypatch, tmp_path) -> None:
    broken(monkeypatch, Fault("sampler.stream", 1))
    with pytest.raises(ActorDied, match=r"sampler's process died; max_restarts = 0, so the run ends in step 1"):
        train(tmp_path, "on_policy", "placement=ray", "max_restarts=0", "warm_start.steps=1", "evaluation.every=0")


@pytest.mark.parametrize("method", ["sampler.stream", "sampler.wake"])
def test_a_sampler_out_of_memory_starts_again_with_half_the_room(method, references, monkeypatch, tmp_path) -> None:
    hosts = broken(monkeypatch, Fault(method, 3, error=OutOfMemory), Fault("sampler.make", 2, error=OutOfMemory))
    rooms = []
    make_sampler = placement.Blueprint.make_sampler

    def watched(self, base):
        rooms.append(self.room.sequences)
        return make_sampler(self, base)

    monkeypatch.setattr(placement.Blueprint, "make_sampler", watched)
    result = RunDir(train(tmp_path, "on_policy", "placement=ray").run_dir)
    assert not hosts.faults and rooms == [64, 32, 16]
    first, second = warnings_of(result)
    assert "the cache does not fit; sampler and trainer start again, with 32 sequences at once in place of 64" in first
    assert "with 16 sequences at once in place of 32" in second
    assert [row["step"] for row in result.metrics()] == list(range(9))


def test_what_is_no_dead_process_is_raised_as_before(monkeypatch, tmp_path) -> None:
    hosts = broken(monkeypatch, Fault("trainer.optim_step", 15, error=EngineError))
    with pytest.raises(EngineError, match="the cache does not fit") as caught:
        train(tmp_path, "on_policy", "placement=ray")
    assert type(caught.value) is EngineError
    assert hosts.built == ["sampler", "trainer"] == sorted(hosts.closed)


def test_restarts_are_counted_from_the_furthest_step_ever_reached(tmp_path) -> None:
    """A run that loses two steps at each failure and wins two back gets nowhere."""
    directory = RunDir.create(tmp_path, "run", {})
    restarts = Restarts(2, directory)
    died = ActorDied("the trainer's process died", "trainer")

    def reach(*steps: int) -> None:
        directory.truncate_after(steps[0] - 1)
        for step in steps:
            directory.append_metrics(step, {})

    assert restarts.allow(died) == "restart 1 of 2"
    assert restarts.allow(died) == "restart 2 of 2"
    reach(1, 2, 3, 4)
    assert restarts.allow(died) == "restart 1 of 2"
    reach(3, 4)
    assert restarts.allow(died) == "restart 2 of 2"
    reach(3, 4, 5)
    assert restarts.allow(SamplerOutOfMemory("full")) == "restart 1 of 2"
    reach(5)
    assert restarts.allow(died) == "restart 2 of 2"
    with pytest.raises(ActorDied, match="that is failure 3 in step 6, and max_restarts = 2"):
        restarts.allow(died)
