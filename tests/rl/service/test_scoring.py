"""Rewards while the sampler still draws: overlap, order, failures, limits. A clock moved by hand, or none."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from posttrain.rl import metrics
from posttrain.rl.errors import EngineError, RewardError
from posttrain.rl.rewards import Rubric
from posttrain.rl.service import scoring
from posttrain.rl.service.production import rollout_metrics
from posttrain.rl.service.scoring import Draws
from posttrain.rl.timeline import Timeline
from posttrain.rl.types import SamplingParams
from tests.fakes import FakeSampler, numbered, prompt

PARAMS = SamplingParams(max_tokens=4)


def draws_of(*rewards, pauses: random.Random | None = None, group_size: int = 3) -> tuple[Draws, FakeSampler]:
    sampler = FakeSampler(pauses=pauses)
    return Draws(sampler, Rubric(rewards or [numbered]), group_size, PARAMS), sampler


def prompts(count: int):
    return [prompt(f"p{index}") for index in range(count)]


async def test_a_group_is_scored_while_the_next_is_drawn() -> None:
    """The second group is drawn only once the first has been scored: scoring afterwards would hang."""
    scored = asyncio.Event()

    async def judge(completion: str) -> float:
        if completion.startswith("p0"):
            scored.set()
        return numbered(completion)

    draws, sampler = draws_of(judge)
    begun = 0

    async def hold(name: str) -> None:
        nonlocal begun
        begun += name == "group"
        if begun == 2:
            await scored.wait()

    sampler.before = hold
    drawn = await asyncio.wait_for(draws.groups(prompts(3), Timeline()), 10)
    assert [group.prompt.id for group in drawn.groups] == ["p0", "p1", "p2"]


async def test_sampled_is_called_after_the_last_sample_and_before_the_rewards_are_done() -> None:
    told = asyncio.Event()

    async def judge(completion: str) -> float:
        await told.wait()
        return numbered(completion)

    draws, sampler = draws_of(judge)

    async def sampled() -> None:
        assert sampler.open_streams == 0
        told.set()

    drawn = await asyncio.wait_for(draws.groups(prompts(2), Timeline(), sampled=sampled), 10)
    assert [r.reward for g in drawn.groups for r in g.rollouts] == [0, 1, 2, 0, 1, 2]


def awkward(completion: str) -> float:
    """Sums of these differ in the last bit by their order."""
    return 0.1 * (1 + hash_of(completion) % 97) / 3


def hash_of(text: str) -> int:
    return sum((place + 1) * ord(character) for place, character in enumerate(text.split("@")[0]))


async def slow(completion: str) -> float | None:
    for _ in range(hash_of(completion) % 13):
        await asyncio.sleep(0)
    return None if hash_of(completion) % 5 == 0 else 1 / (1 + hash_of(completion) % 7)


async def test_groups_and_figures_are_bit_for_bit_those_of_scoring_them_together() -> None:
    rubric = Rubric([awkward, slow])
    sampler = FakeSampler()
    asked = prompts(9)
    completions = await sampler.sample(asked, 4, PARAMS)
    expected = await rubric.score(list(zip(asked, completions, strict=True)), step=3)
    figures = metrics.values({**rubric.metrics(expected), **rollout_metrics(expected)})
    orders = set()
    for seed in range(8):
        draws, _ = draws_of(awkward, slow, pauses=random.Random(seed), group_size=4)
        arrived = [index async for index, _ in draws.sampler.stream(asked, 4, PARAMS)]
        orders.add(tuple(arrived))
        drawn = await draws.groups(asked, Timeline(), step=3)
        assert drawn.groups == expected
        assert metrics.values({**draws.rubric.metrics(drawn.groups), **rollout_metrics(drawn.groups)}) == figures
    assert len(orders) > 4, "they came in different orders"


async def test_the_step_reaches_the_rewards() -> None:
    seen = set()

    def reward(completion: str, step: int) -> float:
        seen.add(step)
        return 0.0

    draws, _ = draws_of(reward)
    await draws.groups(prompts(1), Timeline(), step=17)
    assert seen == {17}


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_bug_in_a_reward_abandons_generation_at_once(kind: str) -> None:
    """The second group is never finished: only the first group's failure can end this."""

    def fragile(completion: str) -> float:
        raise ZeroDivisionError("a bug")

    async def fragile_async(completion: str) -> float:
        raise ZeroDivisionError("a bug")

    draws, sampler = draws_of(fragile if kind == "sync" else fragile_async)
    begun = 0

    async def hold(name: str) -> None:
        nonlocal begun
        begun += name == "group"
        if begun == 2:
            await asyncio.Event().wait()

    sampler.before = hold
    before = asyncio.all_tasks()
    with pytest.raises(RewardError, match=r"fragile(_async)? raised ZeroDivisionError on .*p0.*: a bug") as caught:
        await asyncio.wait_for(draws.groups(prompts(3), Timeline()), 10)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert begun == 2 and sampler.open_streams == 0, "the stream was closed"
    assert asyncio.all_tasks() == before


async def test_a_failing_sampler_is_raised_as_it_is_and_ends_the_rewards() -> None:
    started, ended = asyncio.Event(), []

    async def judge(completion: str) -> float:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(completion)
        raise AssertionError("unreachable")

    draws, sampler = draws_of(judge, group_size=1)
    begun = 0

    async def fail(name: str) -> None:
        nonlocal begun
        begun += name == "group"
        if begun == 2:
            await started.wait()
            raise EngineError("gone")

    sampler.before = fail
    with pytest.raises(EngineError, match=r"^gone$"):
        await asyncio.wait_for(draws.groups(prompts(2), Timeline()), 10)
    assert ended == ["p0/0@-1"]


async def test_a_slow_judge_gets_a_limited_number_of_groups_at_once(monkeypatch) -> None:
    monkeypatch.setattr(scoring, "GROUPS_AT_ONCE", 3)
    at_work, most, all_drawn = set(), 0, asyncio.Event()

    async def judge(completion: str) -> float:
        nonlocal most
        group = completion.split("/")[0]
        at_work.add(group)
        most = max(most, len(at_work))
        await all_drawn.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        at_work.discard(group)
        return 0.0

    draws, _ = draws_of(judge)

    async def sampled() -> None:
        all_drawn.set()

    await asyncio.wait_for(draws.groups(prompts(10), Timeline(), sampled=sampled), 10)
    assert most == 3, "and generation did not wait for the judge"


async def test_asynchronous_rewards_of_different_groups_overlap() -> None:
    """Every group waits until all of them are being scored."""
    begun = set()
    together = asyncio.Event()

    async def judge(completion: str) -> float:
        begun.add(completion.split("/")[0])
        if len(begun) == 5:
            together.set()
        await together.wait()
        return 0.0

    draws, _ = draws_of(judge)
    await asyncio.wait_for(draws.groups(prompts(5), Timeline()), 10)


async def test_synchronous_rewards_run_one_at_a_time_in_one_thread() -> None:
    inside, threads = 0, set()

    def unsafe(completion: str) -> float:
        nonlocal inside
        inside += 1
        threads.add(threading.get_ident())
        for _ in range(200):
            assert inside == 1
        inside -= 1
        return 0.0

    draws, _ = draws_of(unsafe)
    await draws.groups(prompts(12), Timeline())
    assert len(threads) == 1 and threads != {threading.get_ident()}


async def test_seconds_of_sampling_of_rewards_and_of_what_rewards_add() -> None:
    """Groups come at 10 and 30; the judge works from 10 to 15 and from 30 to 37."""
    clock = 0.0

    async def judge(completion: str) -> float:
        nonlocal clock
        clock += 5 if completion.startswith("p0") else 7
        return 0.0

    draws, sampler = draws_of(judge, group_size=1)
    comes_at = iter([10.0, 30.0])

    async def pass_time(name: str) -> None:
        nonlocal clock
        if name == "group":
            for _ in range(20):  # the group before is scored meanwhile
                await asyncio.sleep(0)
            clock = next(comes_at)

    sampler.before = pass_time
    timeline = Timeline(lambda: clock)
    drawn = await draws.groups(prompts(2), timeline)
    assert (drawn.rollout_s, drawn.reward_s, drawn.reward_busy_s) == (30.0, 7.0, 12.0)
    spans = [(span.name, span.start, span.stop) for span in timeline.cut().spans]
    assert spans == [("rollout", 0.0, 30.0), ("reward", 10.0, 15.0), ("reward", 30.0, 37.0)]
