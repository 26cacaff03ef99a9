"""``gpus = 2`` on a CPU: two engines and two trainers in Ray actors do what one of each does, in float64."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain import rl
from posttrain.rl.run_dir import RunDir
from posttrain.rl.service.actors import ActorCaller
from tests.rl.service.tiny_runs import MODEL, ROWS, reproducible, settings, spread

EXACT = ("reward/", "rollout/", "staleness/", "eval/", "optim/learning_rate", "step")
"""What does not depend on the order of a sum over tokens."""


def train(folder: Path, **changes: Any) -> rl.RunResult:
    options = {
        "model": {**MODEL, "dtype": "float64"},
        "algorithm": {"name": "grpo", "kl_coef": 0.05},
        "prompts_per_step": 5,  # no multiple of two
        "micro_batch_tokens": 24,  # and several micro-batches a trainer
        "epochs_per_batch": 2,
        "eval_dataset": ROWS[:3],
        "evaluation": {"every": 2, "samples": 2},
        "dataset": ROWS,
        "rewards": [spread],
        "output_dir": str(folder),
    }
    return rl.train(**settings(**{**options, **changes}))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> rl.RunResult:
    """One engine and one trainer, in this process."""
    return train(tmp_path_factory.mktemp("alone"))


def assert_the_same(result: rl.RunResult, alone: rl.RunResult) -> None:
    run, other = RunDir(result.run_dir), RunDir(alone.run_dir)
    for step in (1, 2, 3):
        drawn = [row["completion"] for row in run.rollouts(step)]
        assert drawn == [row["completion"] for row in other.rollouts(step)] and len(drawn) == 20
    for row, expected in zip(reproducible(result.metrics), reproducible(alone.metrics), strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            if key.startswith(EXACT):
                assert row[key] == value, key
            else:  # transformers' norms and the sampler's logprobs are float32: 1e-7 of them may turn the other way
                assert row[key] == pytest.approx(value, rel=1e-6, abs=1e-7), key
    ours, theirs = (load_file(r.checkpoint / "adapter_model.safetensors") for r in (result, alone))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-8)
    assert max(float(tensor.abs().max()) for name, tensor in theirs.items() if "lora_B" in name) > 1e-3


@pytest.mark.slow
def test_two_pairs_train_as_one_does(tmp_path, alone) -> None:
    assert_the_same(train(tmp_path, gpus=2, placement="ray"), alone)


@pytest.mark.slow
def test_when_one_of_two_trainers_dies_the_run_goes_on_to_the_same_end(tmp_path, alone, monkeypatch) -> None:
    """Killed in the second step, between sampling and training: the other one must not wait for it."""
    made: list[tuple[str, int]] = []
    make = ActorCaller.make

    async def noted(self: ActorCaller, what: Any) -> None:
        await make(self, what)
        made.append((self.name, self.home.pid))

    monkeypatch.setattr(ActorCaller, "make", noted)
    calls = 0

    def deadly(completion: str) -> float:
        nonlocal calls
        calls += 1
        if calls == 6 + 20 + 20:  # evaluation, step 1, and the last sample of step 2
            os.kill(dict(made)["trainer 1"], signal.SIGKILL)
        return spread(completion)

    deadly.__name__ = "spread"
    result = train(tmp_path, gpus=2, placement="ray", rewards=[deadly], checkpoint={"every": 1})
    assert_the_same(result, alone)
    names = sorted(name for name, _ in made)
    assert names == ["sampler 0", "sampler 1", "trainer 0", "trainer 0", "trainer 1", "trainer 1"]
