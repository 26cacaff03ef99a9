"""Actors killed with SIGKILL in mid-call: the run goes on by itself, and equals one that nobody touched."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter

import pytest
import ray

from posttrain import rl
from posttrain.rl.config import load
from posttrain.rl.run_dir import RunDir
from posttrain.rl.service import run
from posttrain.rl.service.actors import ActorCaller, Actors
from tests.rl.service.tiny_runs import ROWS, settings, spread

from .killing import Killing
from .test_kill_and_resume import CONFIG, MODES, assert_same_run

pytestmark = pytest.mark.slow

KILLS = {
    # Two epochs a step: calls 1 to 12 of forward_backward are the warm start's, 13 and 14 step 1's, and so on.
    "on_policy": {("trainer", "forward_backward", 16), ("sampler", "stream", 7), ("trainer", "save", 4)},
    "overlapped": {("sampler", "stream", 6), ("trainer", "forward_backward", 22)},
}


@pytest.fixture(scope="module")
def session():
    """One Ray for both runs."""
    with Actors(1, gpu=False, cpu_threads=1).reserved():
        yield
    assert not ray.is_initialized()


@pytest.mark.parametrize("mode", MODES)
def test_killed_actors_do_not_show_in_the_run(mode, session, monkeypatch, tmp_path) -> None:
    killing = Killing(monkeypatch, KILLS[mode])
    options = [option for option in MODES[mode] if option != "--set"]
    config = load(CONFIG, [f"output_dir={tmp_path}", "run_name=run", "placement=ray", *options])
    result = RunDir(run.train(config, base=CONFIG.parent).run_dir)
    assert not killing.waiting
    monkeypatch.undo()
    quiet = ["logging.console=off", "placement=embedded"]
    whole = load(CONFIG, [f"output_dir={tmp_path}", "run_name=whole", *quiet, *options])
    assert_same_run(result, RunDir(run.train(whole, base=CONFIG.parent).run_dir), mode)
    lost = Counter(name for name, _, _ in KILLS[mode])
    assert Counter(name for name, _, _ in killing.homes) == {
        "sampler": 1 + lost["sampler"],
        "trainer": 1 + lost["trainer"] + lost["sampler"],
    }
    warnings = [line for line in result.messages_file.read_text().splitlines() if " warning: " in line]
    assert len(warnings) == len(KILLS[mode]) and all("process died" in line for line in warnings)


def test_two_pairs_of_which_one_loses_its_trainer(session, monkeypatch, tmp_path) -> None:
    """Both trainers start again, the engines live, and the figures are those of one pair but for rounding."""
    killed, homes = [], []
    call, make = ActorCaller.__call__, ActorCaller.make

    async def called(self, method, *args, **kwargs):
        working = asyncio.ensure_future(call(self, method, *args, **kwargs))
        if self.name == "trainer 1" and method == "optim_step" and not killed and len(RunDir(folder).metrics()) == 2:
            killed.append(self.name)
            os.kill(self.home.pid, signal.SIGKILL)
        return await working

    async def made(self, maker):
        await make(self, maker)
        homes.append(self.name)

    monkeypatch.setattr(ActorCaller, "__call__", called)
    monkeypatch.setattr(ActorCaller, "make", made)
    folder = tmp_path / "pairs" / "run"
    common = {"dataset": ROWS, "rewards": [spread], "run_name": "run", "steps": 3, "checkpoint": {"every": 1}}
    pairs = rl.train(**settings(gpus=2, placement="ray", output_dir=str(tmp_path / "pairs"), **common))
    monkeypatch.undo()
    assert killed and Counter(homes) == {"sampler 0": 1, "sampler 1": 1, "trainer 0": 2, "trainer 1": 2}
    single = rl.train(**settings(output_dir=str(tmp_path / "single"), **common))
    for ours, theirs in zip(pairs.metrics, single.metrics, strict=True):
        for key in ("reward/mean", "rollout/completion_tokens", "optim/grad_norm", "policy/entropy", "loss/total"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
