"""Evaluation: pass@k by counting every draw, figures by hand, the same seeds every time."""

from __future__ import annotations

import functools
import itertools

import pytest

from posttrain.rl.rewards import Rubric, reward
from posttrain.rl.service.evaluation import Evaluator, pass_at_k
from tests.fakes import STOP_ID, FakeSampler, config, prompt


def test_pass_at_k_is_the_share_of_draws_with_a_pass() -> None:
    for samples in range(1, 8):
        for correct in range(samples + 1):
            outcomes = [index < correct for index in range(samples)]
            for k in range(1, samples + 1):
                draws = list(itertools.combinations(outcomes, k))
                expected = sum(any(draw) for draw in draws) / len(draws)
                assert pass_at_k(correct, samples, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_keeps_its_digits_for_many_samples() -> None:
    assert pass_at_k(1, 10_000, 1) == pytest.approx(1e-4, rel=1e-9)
    assert pass_at_k(3, 10_000, 9_998) == 1.0


def scored(completion: str) -> float:
    """eval-0: 1 0 0 0; eval-1: 1 1 .5 0; eval-2: all 0."""
    prompt_id, sample = completion.split("@")[0].split("/")
    return [[1, 0, 0, 0], [1, 1, 0.5, 0], [0, 0, 0, 0]][int(prompt_id[-1])][int(sample)]


def evaluator_of(**evaluation) -> tuple[Evaluator, FakeSampler]:
    settings = config(evaluation={"every": 1, "samples": 4, **evaluation}, top_p=0.9, top_k=3, min_p=0.1, seed=5)
    sampler = FakeSampler()
    sampler.version = 2
    prompts = [prompt(f"eval-{index}") for index in range(3)]
    return Evaluator(settings, sampler, Rubric([scored]), prompts, (STOP_ID,)), sampler


async def test_figures_by_hand() -> None:
    evaluator, _ = evaluator_of()
    figures, groups = await evaluator.evaluate()
    assert figures["eval/pass@1"] == pytest.approx((1 / 4 + 2 / 4 + 0) / 3)
    assert figures["eval/pass@4"] == pytest.approx(2 / 3)
    assert figures["eval/reward/mean"] == pytest.approx(3.5 / 12)
    assert figures["eval/reward/scored/mean"] == pytest.approx(3.5 / 12)
    assert figures["eval/rollout/completion_tokens"] == pytest.approx((1 + 2 + 3 + 1) / 4)
    assert figures["eval/rollout/truncated"] == 0
    assert figures["eval/prompts"] == 3
    assert all(key.startswith("eval/") for key in figures)
    assert [len(group.rollouts) for group in groups] == [4, 4, 4]


@pytest.mark.parametrize(("success", "expected"), [(0.5, (1 + 3) / 12), (1.0, 3 / 12), (1.1, 0.0)])
async def test_success_is_a_reward_that_reaches_the_bar(success, expected) -> None:
    evaluator, _ = evaluator_of(success=success)
    figures, _ = await evaluator.evaluate()
    assert figures["eval/pass@1"] == pytest.approx(expected)


async def test_rewards_are_weighed_as_in_the_last_step() -> None:
    reward(weight=[(1, 0.0), (4, 3.0)])(scheduled := functools.partial(scored))
    settings = config(steps=3, evaluation={"every": 1, "samples": 4})
    prompts = [prompt(f"eval-{index}") for index in range(3)]
    figures, _ = await Evaluator(settings, FakeSampler(), Rubric([scheduled]), prompts, (STOP_ID,)).evaluate()
    assert figures["eval/reward/scored/weight"] == 2.0
    assert figures["eval/reward/mean"] == pytest.approx(2 * 3.5 / 12)
    assert figures["eval/reward/scored/mean"] == pytest.approx(3.5 / 12)


async def test_at_most_max_prompts_in_order() -> None:
    evaluator, sampler = evaluator_of(max_prompts=2)
    figures, _ = await evaluator.evaluate()
    assert sampler.events == [("sample", ("eval-0", "eval-1"), 2)]
    assert figures["eval/prompts"] == 2


async def test_one_sample_has_one_figure() -> None:
    evaluator, _ = evaluator_of(samples=1, temperature=0)
    figures, _ = await evaluator.evaluate()
    assert [key for key in figures if "pass@" in key] == ["eval/pass@1"]


async def test_drawn_at_its_own_temperature_without_truncation(monkeypatch) -> None:
    evaluator, sampler = evaluator_of(temperature=0.3)
    seen = []
    original = sampler.stream

    def stream(prompts, n, params):
        seen.append((n, params))
        return original(prompts, n, params)

    monkeypatch.setattr(sampler, "stream", stream)
    await evaluator.evaluate()
    await evaluator.evaluate()
    (n, params), again = seen
    assert (n, params) == again, "the same seeds every time"
    assert (n, params.temperature, params.top_p, params.top_k, params.min_p) == (4, 0.3, 1.0, 0, 0.0)
    assert (params.seed, params.stop_token_ids, params.max_tokens) == (5, (STOP_ID,), 4)
