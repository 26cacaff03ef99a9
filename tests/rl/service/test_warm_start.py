"""The supervised warm start: what is drawn, what is minimised, what is reported."""

from __future__ import annotations

from collections import Counter

import pytest

from posttrain.rl.config import WarmStartConfig
from posttrain.rl.metrics import Sum
from posttrain.rl.service.warm_start import warm_start
from tests.fakes import FakeLearner, config

EXAMPLES = [((5, index), (7, 8, index)) for index in range(10)]


class Falling(FakeLearner):
    """A loss of 100 at the first step that falls by 1 a step."""

    async def forward_backward(self, batches, algorithm):
        self.algorithm = algorithm
        await super().forward_backward(batches, algorithm)
        return {"loss/total": Sum(100.0 - self.version)}


async def run(steps: int = 20, batch_size: int = 4, seed: int = 0, **settings) -> tuple[Falling, dict, list[str]]:
    learner, said = Falling(), []
    chosen = WarmStartConfig(steps=steps, batch_size=batch_size, learning_rate=3e-3)
    figures = await warm_start(config(seed=seed, **settings), chosen, learner, EXAMPLES, said.append)
    return learner, figures, said


def drawn(learner: Falling) -> list[list[int]]:
    """The number of each example, step by step."""
    steps = []
    for batches in learner.batches:
        ends = [end - 1 for batch in batches for end in batch.cu_seqlens[1:].tolist()]
        assert len(batches) == 1
        steps.append([int(batches[0].input_ids[end]) for end in ends])
    return steps


async def test_every_example_comes_once_an_epoch() -> None:
    learner, _, _ = await run(steps=5, batch_size=4)
    counts = Counter(number for step in drawn(learner) for number in step)
    assert counts == dict.fromkeys(range(10), 2), "20 draws of 10 examples"
    assert [len(step) for step in drawn(learner)] == [4] * 5


async def test_a_batch_may_be_larger_than_the_data() -> None:
    learner, _, _ = await run(steps=2, batch_size=25)
    assert [len(step) for step in drawn(learner)] == [25, 25]
    assert Counter(number for step in drawn(learner) for number in step) == dict.fromkeys(range(10), 5)


async def test_the_order_is_the_seeds() -> None:
    first, again, other = [drawn((await run(seed=seed))[0]) for seed in (1, 1, 2)]
    assert first == again != other


async def test_only_completions_are_imitated_each_token_with_weight_1() -> None:
    learner, _, _ = await run(steps=1)
    [[batch]] = learner.batches
    assert batch.loss_mask.tolist() == [False, False, True, True, True] * 4
    assert batch.advantages.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0] * 4
    assert (batch.num_loss_tokens, batch.num_sequences) == (12, 4)
    assert learner.algorithm.name == "cross_entropy"


async def test_steps_are_cut_into_micro_batches() -> None:
    learner, _, _ = await run(steps=2, micro_batch_tokens=10)
    assert [[batch.num_sequences for batch in batches] for batches in learner.batches] == [[4, 4], [4, 4]]
    assert [[len(batch.cu_seqlens) - 1 for batch in batches] for batches in learner.batches] == [[2, 2], [2, 2]]


async def test_optimizer_settings_and_reset() -> None:
    learner, _, _ = await run(steps=3, betas=(0.8, 0.95), max_grad_norm=0.3)
    assert [(p.learning_rate, p.betas, p.max_grad_norm) for p in learner.params] == [(3e-3, (0.8, 0.95), 0.3)] * 3
    assert learner.version == 3 and learner.resets == 1


@pytest.mark.parametrize(("steps", "expected"), [(20, (82 + 81) / 2), (1, 100.0), (9, 92.0)])
async def test_reports_the_mean_of_the_last_tenth(steps, expected) -> None:
    _, figures, _ = await run(steps=steps)
    assert figures == {"loss/warm_start": pytest.approx(expected)}


async def test_says_five_times_how_far_it_is() -> None:
    _, _, said = await run(steps=20)
    assert len(said) == 5
    assert said[0] == "warm start 4/20: cross-entropy 97.000 nats a token"
    assert said[-1].startswith("warm start 20/20")
