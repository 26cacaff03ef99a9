"""A trainer that shows its gradient, and an optimizer step of random sequences."""

from __future__ import annotations

import random
import time

import torch
from torch import Tensor

from posttrain.rl.algorithms import parse
from posttrain.rl.batching import BatchSettings, plan
from posttrain.rl.types import Completion, Prompt, Rollout, RolloutGroup, TrainBatch
from posttrain.trainer.trainer import Trainer

GROUP = 8


class GradientProbe(Trainer):
    """One of one, or of several, trainers."""

    def randomize(self, seed: int, scale: float) -> None:
        """Random B: beside the zeros that an adapter starts from, A has no gradient."""
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad():
            for name, weight in self._weights.items():
                if ".lora_B." in name:
                    weight.normal_(0, scale, generator=generator)

    def gradient(self) -> Tensor:
        """All of it end to end, summed over the ranks, on the host; it is cleared."""
        targets = self._optimizer.targets()
        if self._ranks is not None:
            self._ranks.sum_gradients(targets)
        flat = torch.cat([weight.grad.reshape(-1) for weight in targets.values() if weight.grad is not None]).cpu()
        self.clear_gradients()
        return flat

    def sum_seconds(self) -> float:
        """What summing takes, once it is warm."""
        assert self._ranks is not None
        for _ in range(3):
            began = time.perf_counter()
            self._ranks.sum_gradients(self._optimizer.targets())
            seconds = time.perf_counter() - began
        return seconds


def step_batches(sequences: int, vocabulary: int, budget: int) -> list[TrainBatch]:
    """Prompts of 32 tokens, completions of 32 to 480, groups of ``GROUP`` with random rewards."""
    draw = random.Random(0)
    groups = []
    for index in range(max(1, sequences // GROUP)):
        prompt = Prompt(str(index), "", {}, tuple(draw.choices(range(vocabulary), k=32)))
        rollouts = []
        for _ in range(GROUP):
            ids = tuple(draw.choices(range(vocabulary), k=draw.randint(32, 480)))
            completion = Completion(ids, (-5.0,) * len(ids), "", "length", 0)
            rollouts.append(Rollout(completion, {}, 0.0, advantage=draw.gauss(0, 1)))
        groups.append(RolloutGroup(prompt, rollouts))
    [batches] = plan(groups, parse("grpo"), BatchSettings(budget, 1, 512))
    return batches
