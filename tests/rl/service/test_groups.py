"""Routing, merging and failures of groups over fakes. Real trainers: ``tests/trainer/test_distributed.py``."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch

from posttrain.rl import algorithms
from posttrain.rl.errors import ActorDied, EngineError, OutOfMemory
from posttrain.rl.metrics import Max, Mean, Sum
from posttrain.rl.repack import repack
from posttrain.rl.service import groups as groups_module
from posttrain.rl.service.groups import LearnerGroup, SamplerGroup, chunks
from posttrain.rl.service.weight_sync import publish
from posttrain.rl.types import Adapter, OptimParams, SamplingParams, Scores, TrainBatch
from tests.fakes import FakeLearner, FakeSampler, completion, prompt

PARAMS = SamplingParams(max_tokens=4)
STEP = OptimParams(learning_rate=0.1)


class Engine(FakeSampler):
    """Takes ``seconds`` for a prompt and notes what it is asked for."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.chunks: list[list[str]] = []
        self.inside = 0
        self.version = 0

    async def stream(self, prompts, n, params):
        self.inside += 1
        assert self.inside == 1, "an engine works on one chunk at a time"
        self.chunks.append([p.id for p in prompts])
        await self._call("stream")
        for index in reversed(range(len(prompts))):  # not in the order of the prompts
            await asyncio.sleep(self.seconds)
            yield index, [completion(f"{prompts[index].id}/{i}", self.version) for i in range(n)]
        self.inside -= 1

    @property
    def drawn(self) -> list[str]:
        return list(chain.from_iterable(self.chunks))


def names(count: int) -> list[Any]:
    return [prompt(f"p{index}") for index in range(count)]


def expected(prompts: list[Any], n: int) -> list[list[Any]]:
    return [[completion(f"{p.id}/{i}", 0) for i in range(n)] for p in prompts]


@pytest.mark.parametrize(("count", "members", "concurrency"), [(13, 2, 4), (1, 3, 64), (64, 3, 8), (0, 2, 8)])
async def test_every_prompt_is_drawn_once_and_comes_back_in_its_place(count, members, concurrency) -> None:
    engines = [Engine() for _ in range(members)]
    for engine in engines:
        engine._pauses = random.Random(len(engine.events))
    prompts = names(count)
    assert await SamplerGroup(engines, concurrency).sample(prompts, 3, PARAMS) == expected(prompts, 3)
    assert sorted(chain.from_iterable(e.drawn for e in engines)) == sorted(p.id for p in prompts)


async def test_completions_arrive_while_the_other_engine_still_works() -> None:
    slow, fast = Engine(), Engine()
    gate = asyncio.Event()

    async def held(_: str) -> None:
        await gate.wait()

    slow.before = held
    prompts = names(8)
    stream = SamplerGroup([slow, fast], concurrency=100).stream(prompts, 2, PARAMS)
    early = [await anext(stream) for _ in range(4)]
    assert sorted(prompts[index].id for index, _ in early) == sorted(fast.drawn)
    gate.set()
    late = [item async for item in stream]
    assert sorted(index for index, _ in early + late) == list(range(8))
    assert sorted(slow.drawn + fast.drawn) == sorted(p.id for p in prompts)


async def test_a_faster_engine_draws_more() -> None:
    slow, fast = Engine(), Engine()
    rest = asyncio.Event()

    async def until_the_rest_is_drawn(_: str) -> None:
        await rest.wait()

    async def look(_: str) -> None:
        if len(fast.drawn) == 48:
            rest.set()

    slow.before, fast.before = until_the_rest_is_drawn, look
    prompts = names(64)
    drawn = SamplerGroup([slow, fast], concurrency=8).sample(prompts, 4, PARAMS)
    assert await asyncio.wait_for(drawn, timeout=5) == expected(prompts, 4)
    assert [len(chunk) for chunk in slow.chunks] == [16], "a quarter of all prompts, and then there were none left"
    assert [len(chunk) for chunk in fast.chunks] == [16, 8, 8, 4, 4, 4, 4], "never fewer than 16 samples, two batches"


async def test_two_streams_take_turns_on_each_engine() -> None:
    engines = [Engine(), Engine()]
    group = SamplerGroup(engines, concurrency=2)
    one, two = names(12), [prompt(f"other{i}") for i in range(12)]
    drawn = await asyncio.gather(group.sample(one, 1, PARAMS), group.sample(two, 1, PARAMS))
    assert drawn == [expected(one, 1), expected(two, 1)]


async def test_what_one_engine_raises_ends_the_stream_and_leaves_no_task() -> None:
    good, bad = Engine(seconds=10.0), Engine()

    async def fail(_: str) -> None:
        raise ActorDied("gone", "sampler 1")

    bad.before = fail
    with pytest.raises(ActorDied):
        await SamplerGroup([good, bad], concurrency=2).sample(names(9), 1, PARAMS)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_stream_that_is_given_up_leaves_no_task() -> None:
    engines = [Engine(seconds=0.001), Engine(seconds=10.0)]
    stream = SamplerGroup(engines, concurrency=100).stream(names(6), 1, PARAMS)
    await anext(stream)
    await stream.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize(
    ("count", "members", "least", "sizes"),
    [
        (128, 2, 8, [32, 32, 16, 16, 8, 8, 8, 8]),
        (128, 2, 128, [64, 64]),  # what an engine takes at once is not cut
        (128, 2, 64, [64, 64]),
        (130, 2, 16, [32, 32, 16, 16, 17, 17]),
        (5, 2, 1, [1, 1, 1, 1, 1]),
        (5, 2, 3, [3, 2]),
        (3, 4, 8, [1, 1, 1]),
        (10, 1, 2, [4, 2, 2, 2]),
        (0, 3, 4, []),
    ],
)
def test_chunks_shrink_towards_the_end_and_never_below_what_keeps_an_engine_busy(count, members, least, sizes) -> None:
    cut = chunks([7] * count, members, least)
    assert [len(chunk) for chunk in cut] == sizes
    assert sorted(chain.from_iterable(cut)) == list(range(count))


def test_a_round_is_dealt_by_cost() -> None:
    # 9 to the first, 8 to the second, 5 to the second (8 < 9), 4 to the first (9 < 13), 3 to the first, on a tie at 13.
    assert list(chunks([3, 9, 4, 8, 5], 2, 100)) == [[0, 1, 2], [3, 4]]


class Slice(FakeLearner):
    """Scores a token by its id; reports what it was given."""

    async def score(self, batches, *, reference=False):
        await self._call("score")
        shift = 1000 if reference else 0
        return [Scores(b.input_ids.double() + shift, b.position_ids.double()) for b in batches]

    async def forward_backward(self, batches, algorithm):
        await self._call("forward_backward")
        self.batches.append(list(batches))
        tokens = [float(b.loss_mask.sum()) for b in batches]
        if not tokens:
            return {}
        return {"loss/total": Sum(sum(tokens)), "mean": Mean(sum(tokens), len(tokens)), "max": Max(max(tokens))}

    async def memory(self):
        return {"peak_memory_gib": 1.0 + len(self.batches), "allocated_gib": 3.0 - len(self.batches)}


def batch(lengths: list[int], first_id: int = 0) -> TrainBatch:
    total = sum(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return TrainBatch(
        input_ids=torch.arange(first_id, first_id + total),
        position_ids=positions,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        loss_mask=positions > 0,
        advantages=torch.ones(total),
        num_loss_tokens=100,
        num_sequences=9,
        num_micro_batches=2,
        max_tokens=16,
    )


BATCHES = [batch([10, 2, 4]), batch([7, 3], first_id=100)]


async def test_scores_of_dealt_batches_come_back_in_the_callers_shape() -> None:
    group = LearnerGroup([Slice(), Slice(), Slice()])
    for reference in (False, True):
        scores = await group.score(BATCHES, reference=reference)
        for given, scored in zip(BATCHES, scores, strict=True):
            assert torch.equal(scored.logprobs, given.input_ids.double() + 1000 * reference)
            assert torch.equal(scored.entropy, given.position_ids.double())


async def test_gradients_are_dealt_by_tokens_within_the_largest_batch_and_metrics_are_merged() -> None:
    members = [Slice(), Slice()]
    merged = await LearnerGroup(members).forward_backward(BATCHES, algorithms.parse("grpo"))
    shares = [[b.cu_seqlens.diff().tolist() for b in member.batches[0]] for member in members]
    assert shares == [[[10, 3]], [[7, 4, 2]]]  # 10 | 7, 4, then 3 and 2 to whoever has less, 16 at most in one batch
    assert {b.num_micro_batches for member in members for b in member.batches[0]} == {2}
    assert merged["loss/total"].value() == 26 - 5  # every token but five first ones
    assert merged["mean"].value() == (11 + 10) / 2 and merged["max"].value() == 11
    smaller = [batch([10]), batch([2, 4]), batch([7, 3])]
    await LearnerGroup(members).forward_backward(smaller, algorithms.parse("grpo"))
    assert all(len(b.input_ids) <= 10 for member in members for b in member.batches[1])


async def test_where_prompts_are_shared_groups_are_dealt_whole_within_the_largest_batchs_cost() -> None:
    """Two prompts of 4 tokens, each with four completions of 2: 12 tokens a group, 48 counted in full."""
    ids = torch.tensor([[prompt] * 4 + [9, 9] for prompt in (1, 2) for _ in range(4)])
    given = replace(
        batch([6] * 8), input_ids=ids.flatten(), loss_mask=(torch.arange(6) >= 4).repeat(8), num_loss_tokens=16
    )
    members = [Slice(), Slice()]
    for batches in ([given], repack([given], 12, share_prompts=True)):
        await LearnerGroup(members, share_prompts=True).forward_backward(batches, algorithms.parse("grpo"))
    for first, second in (member.batches for member in members):
        assert [b.input_ids[b.cu_seqlens[:-1].long()].unique().numel() for b in first] == [1]
        assert [len(b.cu_seqlens) - 1 for b in first] == [len(b.cu_seqlens) - 1 for b in second] == [4]


async def test_a_member_without_a_sequence_takes_part() -> None:
    members = [Slice(), Slice(), Slice()]
    group = LearnerGroup(members)
    merged = await group.forward_backward([batch([5])], algorithms.parse("grpo"))
    assert [len(member.batches[0]) for member in members] == [1, 0, 0] and merged["loss/total"].value() == 4
    assert (await group.optim_step(STEP)).policy_version == 1
    assert [member.version for member in members] == [1, 1, 1]


async def test_verbs_reach_every_member() -> None:
    members = [Slice(), Slice()]
    group = LearnerGroup(members)
    await group.clear_gradients()
    await group.reset_optimizer()
    assert [member.events for member in members] == [[("clear", 0)]] * 2 and [m.resets for m in members] == [1, 1]
    await members[1].forward_backward([], None)
    assert await group.memory() == {"peak_memory_gib": 2.0, "allocated_gib": 3.0}


async def test_one_member_writes_and_all_read(tmp_path) -> None:
    members = [Slice(), Slice()]
    group = LearnerGroup(members)
    await group.optim_step(STEP)
    await group.save(tmp_path)
    assert [[event[0] for event in member.events] for member in members] == [["step", "save"], ["step"]]
    await group.optim_step(STEP)
    await group.load(tmp_path)
    assert [(member.version, member.weight) for member in members] == [(1, 1.0)] * 2


async def test_members_that_drift_apart_are_an_error() -> None:
    members = [Slice(), Slice()]
    group = LearnerGroup(members)
    assert await group.checksum() == "base"
    members[1].base = "another"
    with pytest.raises(EngineError, match="different base weights: base, another"):
        await group.checksum()
    members[1].version = 5
    with pytest.raises(EngineError, match="different steps"):
        await group.optim_step(STEP)


async def test_adapters_are_published_pair_by_pair_and_must_agree() -> None:
    learners, engines = [Slice(), Slice()], [Engine(), Engine()]
    group = LearnerGroup(learners)
    await group.optim_step(STEP)
    published = await publish(group, SamplerGroup(engines, 8))
    assert published.policy_version == 1 and [engine.version for engine in engines] == [1, 1]
    learners[1].weight = 7.0
    with pytest.raises(EngineError, match="different weights"):
        await publish(group, SamplerGroup(engines, 8))
    engines[1].corrupt = True
    with pytest.raises(EngineError, match="different adapters"):
        await SamplerGroup(engines, 8).load_adapter(Adapter(1, "lora", {"weight": torch.ones(1)}, {}))


async def raising(error: BaseException) -> None:
    raise error


async def test_out_of_memory_in_one_member_is_raised_once_the_others_are_done() -> None:
    members = [Slice(), Slice()]
    gate = asyncio.Event()
    finished = []

    async def works(name: str) -> None:
        await gate.wait()
        finished.append(name)

    members[0].before = works
    members[1].before = lambda _: raising(OutOfMemory("too much"))
    call = asyncio.create_task(LearnerGroup(members).forward_backward(BATCHES, algorithms.parse("grpo")))
    await asyncio.sleep(0.01)
    assert not call.done(), "gradients must not be cleared while a member still adds to them"
    gate.set()
    with pytest.raises(OutOfMemory):
        await call
    assert finished == ["forward_backward"] and members[0].closed == 0


@pytest.mark.parametrize("dies", [False, True])
async def test_a_member_that_waits_for_a_failed_one_is_closed_and_the_cause_is_raised(monkeypatch, dies) -> None:
    """The process of a member that hangs is ended by ``close``; its call then fails as that of a dead actor does."""
    monkeypatch.setattr(groups_module, "GRACE_SECONDS", 0.02)
    hanging, failed = Slice(), Slice()
    ended = asyncio.Event()

    async def hangs(_: str) -> None:
        await ended.wait()
        raise EngineError("lost the others")

    async def close() -> None:
        hanging.closed += 1
        ended.set()

    hanging.before, hanging.close = hangs, close  # type: ignore[method-assign]
    cause = ActorDied("gone", "trainer 1") if dies else EngineError("the gradient of x is not finite")
    failed.before = lambda _: raising(cause)
    with pytest.raises(EngineError) as raised:
        await asyncio.wait_for(LearnerGroup([hanging, failed]).optim_step(STEP), timeout=5)
    assert raised.value is cause or not dies
    assert (hanging.closed, failed.closed) == (1, 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_members_that_fail_alike_are_not_closed() -> None:
    members = [Slice(), Slice()]
    for member in members:
        member.before = lambda _: raising(EngineError("the gradient of x is not finite"))
    with pytest.raises(EngineError, match="not finite"):
        await LearnerGroup(members).optim_step(STEP)
    assert [member.closed for member in members] == [0, 0]


async def test_everything_is_closed_even_where_one_fails() -> None:
    engines = [Engine(), Engine(), Engine()]

    async def fails() -> None:
        raise EngineError("stuck")

    engines[0].close = fails  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="stuck"):
        await SamplerGroup(engines, 8).close()
    assert [engine.closed for engine in engines] == [0, 1, 1]


async def test_all_engines_sleep_and_wake() -> None:
    engines = [Engine(), Engine()]
    group = SamplerGroup(engines, 8)
    await group.sleep()
    assert [engine.awake for engine in engines] == [False, False]
    await group.wake()
    assert [engine.awake for engine in engines] == [True, True]
