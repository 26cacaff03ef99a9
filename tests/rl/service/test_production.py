"""From prompts to a step's batch: dynamic sampling, refills, what the figures cover, and plain data and back."""

from __future__ import annotations

import json
import math

import pytest

from posttrain.rl import metrics
from posttrain.rl.data import PromptSource
from posttrain.rl.metrics import Max, Mean, Std, Sum
from posttrain.rl.rewards import Rubric
from posttrain.rl.service.production import (
    Batch,
    Producer,
    batch_from_json,
    batch_to_json,
    rollout_metrics,
    sampling_params,
    tied,
)
from posttrain.rl.timeline import Timeline
from posttrain.rl.types import RolloutGroup
from tests.fakes import STOP_ID, FakeSampler, completion, config, encode, group, prompt, questions

DYNAMIC = {"name": "grpo", "dynamic_sampling": True}


def tied_on(*rows: int):
    """A reward that is equal in the groups of these rows and tells samples apart in the others."""

    def numbered(completion: str) -> float:
        prompt_id, sample = completion.split("@")[0].split("/")
        return 0.5 if int(prompt_id.split("-")[1]) in rows else float(sample)

    return numbered


def producer_of(settings, reward, rows: int = 7) -> tuple[Producer, FakeSampler, PromptSource]:
    sampler = FakeSampler()
    sampler.version = 4
    source = PromptSource(questions(rows), settings.data, settings.seed, encode=encode)
    return Producer(settings, sampler, Rubric([reward]), source, (STOP_ID, 9)), sampler, source


async def produce(producer: Producer, step: int) -> Batch:
    async def rest() -> None:
        """The sampler may stay awake here."""

    return await producer.produce(step, Timeline(), rest)


def drawn(sampler: FakeSampler) -> list[tuple[str, ...]]:
    return [event[1] for event in sampler.events]


async def test_without_dynamic_sampling_tied_groups_are_trained_on() -> None:
    settings = config(data={"shuffle": False}, prompts_per_step=3)
    producer, sampler, _ = producer_of(settings, tied_on(0, 1, 2))
    batch = await produce(producer, 1)
    assert drawn(sampler) == [("0-0", "0-1", "0-2")]
    assert [g.prompt.id for g in batch.groups] == ["0-0", "0-1", "0-2"]


async def test_tied_groups_are_replaced_from_the_rows_that_follow() -> None:
    settings = config(data={"shuffle": False}, prompts_per_step=3, algorithm=DYNAMIC)
    producer, sampler, source = producer_of(settings, tied_on(0, 2, 3, 5))
    batch = await produce(producer, 1)
    # 0 and 2 are tied, so two more; of 3 and 4 one is tied, so one more; 5 is tied, so one more.
    assert drawn(sampler) == [("0-0", "0-1", "0-2"), ("0-3", "0-4"), ("0-5",), ("0-6",)]
    assert [g.prompt.id for g in batch.groups] == ["0-1", "0-4", "0-6"]
    assert batch.cursor == source.state() and batch.cursor["position"] == 7
    following = await produce(producer, 2)
    assert following.groups[0].prompt.id == "1-1", "the next batch goes on in the next epoch"


async def test_figures_cover_what_was_left_out() -> None:
    settings = config(data={"shuffle": False}, prompts_per_step=2, group_size=3, algorithm=DYNAMIC)
    producer, _, _ = producer_of(settings, tied_on(0))
    batch = await produce(producer, 1)
    values = metrics.values(batch.metrics)
    # Groups: .5 .5 .5 (left out), 0 1 2, 0 1 2.
    assert values["rollout/groups"] == 3
    assert values["reward/mean"] == pytest.approx(7.5 / 9)
    rewards = [0.5] * 3 + [0, 1, 2] * 2
    mean = sum(rewards) / 9
    assert values["reward/std"] == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in rewards) / 8))
    assert values["rollout/tied_groups"] == pytest.approx(1 / 3)
    assert values["rollout/completion_tokens"] == pytest.approx(2.0)
    assert values["rollout/completion_tokens_max"] == 3
    assert values["rollout/prompts_too_long"] == 0


@pytest.mark.parametrize("refills", [1, 3])
async def test_refills_are_limited_and_the_step_goes_on_with_fewer(refills: int) -> None:
    settings = config(data={"shuffle": False}, prompts_per_step=2, max_refills=refills, algorithm=DYNAMIC)
    producer, sampler, _ = producer_of(settings, tied_on(1, 2, 3, 4, 5, 6))
    batch = await produce(producer, 1)
    assert [g.prompt.id for g in batch.groups] == ["0-0"]
    assert drawn(sampler) == [("0-0", "0-1"), *[(f"0-{2 + index}",) for index in range(refills)]]


async def test_prompts_too_long_are_counted_in_the_step_that_met_them() -> None:
    settings = config(data={"shuffle": False}, max_prompt_tokens=2, prompts_per_step=2)
    producer, sampler, _ = producer_of(settings, tied_on(), rows=12)  # q10 and q11 have three tokens
    counted = [metrics.values((await produce(producer, step)).metrics)["rollout/prompts_too_long"] for step in range(7)]
    assert counted == [0, 0, 0, 0, 0, 2, 0]
    assert drawn(sampler)[5] == ("1-0", "1-1")


async def test_completions_are_drawn_as_configured() -> None:
    settings = config(temperature=0.7, top_p=0.9, top_k=11, min_p=0.05, max_tokens=4, seed=42)
    params = sampling_params(settings, (STOP_ID, 9))
    assert (params.max_tokens, params.temperature, params.seed) == (4, 0.7, 42)
    assert (params.top_p, params.top_k, params.min_p, params.stop_token_ids) == (0.9, 11, 0.05, (0, 9))


async def test_a_batch_knows_its_step_and_its_policy() -> None:
    producer, _, _ = producer_of(config(), tied_on())
    batch = await produce(producer, 17)
    assert batch.step == 17
    assert {r.completion.policy_version for g in batch.groups for r in g.rollouts} == {4}


@pytest.mark.parametrize(("rewards", "expected"), [([1, 1, 1], True), ([1, 1, 1.0001], False), ([2], True)])
def test_tied(rewards, expected) -> None:
    assert tied(group("a", rewards)) is expected


def test_rollout_metrics_by_hand() -> None:
    groups = [group("a", [1, 1]), group("bcd", [0, 1, 1])]  # lengths 1 2, 1 2 3; prompts of 1 and 3 tokens
    groups[1].rollouts[2].completion = completion("cut", 0, 3, "length")
    values = metrics.values(rollout_metrics(groups))
    assert values == {
        "rollout/completion_tokens": pytest.approx(9 / 5),
        "rollout/completion_tokens_std": pytest.approx(math.sqrt(2.8 / 4)),
        "rollout/completion_tokens_max": 3,
        "rollout/prompt_tokens": 2,
        "rollout/truncated": pytest.approx(1 / 5),
        "rollout/length_correlation": pytest.approx(math.sqrt(3) / 2),  # of the second group: 1 2 3 and 0 1 1
        "rollout/tied_groups": pytest.approx(1 / 2),
        "rollout/groups": 2,
    }


def awkward_batch() -> Batch:
    """Floats that need all their digits, a reward that does not apply, nested columns."""
    made = group("q", [0.1 + 0.2, 1 / 3, -0.0])
    columns = {"answer": 1 / 3, "nested": {"list": [1, None, "ü"], "big": 2**70}, "flag": True}
    made = RolloutGroup(prompt("q", **columns), made.rollouts)
    made.rollouts[1].rewards["style"] = None
    made.rollouts[2].advantage = 5e-324
    figures = {
        "reward/mean": Mean(0.1 + 0.2, 3),
        "time/rollout_s": Sum(1e-17),
        "rollout/completion_tokens_max": Max(7.0),
        "reward/std": Std.of([0.1, 0.2, 1 / 3]),
    }
    return Batch(3, [made], figures, {"epoch": 1, "position": 4, "digest": "ab"})


def test_a_batch_survives_json_exactly() -> None:
    batch = awkward_batch()
    back = batch_from_json(json.loads(json.dumps(batch_to_json(batch))))
    assert back == batch
    assert math.copysign(1, back.groups[0].rollouts[2].reward) == -1
    assert isinstance(back.groups[0].prompt.prompt_ids, tuple)
    assert {type(rollout.completion.completion_ids) for rollout in back.groups[0].rollouts} == {tuple}
    assert metrics.values(back.metrics) == metrics.values(batch.metrics)


def test_figures_can_be_merged_after_the_round_trip() -> None:
    figures = batch_from_json(json.loads(json.dumps(batch_to_json(awkward_batch())))).metrics
    more = {"reward/std": Std.of([4.0]), "reward/mean": Mean(4.0)}
    values = metrics.values(metrics.merge([figures, more]))
    assert values["reward/std"] == Std.of([0.1, 0.2, 1 / 3, 4.0]).value()
    assert values["reward/mean"] == (0.1 + 0.2 + 4.0) / 4


@pytest.mark.parametrize(
    ("rows_tied", "refills", "before_rest"),
    [
        ((), 2, 1),  # nothing is missing after the first draw
        ((0,), 2, 2),  # one prompt is replaced
        ((0, 1, 2, 3, 4, 5, 6), 2, 3),  # every refill is spent
        ((0, 1), 0, 1),
    ],
)
async def test_the_sampler_rests_once_and_only_when_nothing_more_can_be_drawn(rows_tied, refills, before_rest) -> None:
    settings = config(data={"shuffle": False}, max_refills=refills, algorithm=DYNAMIC)
    producer, sampler, _ = producer_of(settings, tied_on(*rows_tied))
    rests = []

    async def rest() -> None:
        rests.append(len(sampler.events))

    await producer.produce(1, Timeline(), rest)
    assert rests == [before_rest] and len(sampler.events) == before_rest


async def test_seconds_of_refills_add_up() -> None:
    settings = config(data={"shuffle": False}, prompts_per_step=2, algorithm=DYNAMIC)
    producer, sampler, _ = producer_of(settings, tied_on(0))
    clock = 0.0

    async def pass_time(name: str) -> None:
        nonlocal clock
        clock += {"sample": 10.0, "group": 1.0}[name]

    async def rest() -> None:
        """The sampler may stay awake here."""

    sampler.before = pass_time
    batch = await producer.produce(1, Timeline(lambda: clock), rest)
    assert metrics.values(batch.metrics)["time/rollout_s"] == 12.0 + 11.0
