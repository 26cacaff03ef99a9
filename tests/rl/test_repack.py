"""Cutting and packing again: nothing lost, nothing moved, and the same gradient."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from posttrain.rl import algorithms
from posttrain.rl.batching import BatchSettings, assign_advantages, plan, with_scores
from posttrain.rl.repack import deal, repack
from posttrain.rl.types import Scores, TrainBatch

from .packed_step import LENGTHS, groups, model, score, step_gradient

OPTIONAL = ("rollout_logprobs", "old_logprobs", "ref_logprobs")
COUNTS = ("num_loss_tokens", "num_sequences", "max_tokens", "temperature", "entropy_threshold")


def step(budget: int, name: str = "grpo", share: bool = False) -> list[TrainBatch]:
    """24 sequences with every optional column filled."""
    algorithm = algorithms.parse(name)
    made = groups()
    assign_advantages(made, algorithm, max_tokens=300)
    [batches] = plan(made, algorithm, BatchSettings(budget, 1, 300, 0.7, share))
    generator = torch.Generator().manual_seed(3)

    def noise(batch: TrainBatch) -> Tensor:
        return torch.randn(batch.input_ids.shape, generator=generator, dtype=torch.float64) * 0.1 - 2.5

    old = [Scores(noise(b), noise(b).abs()) for b in batches]
    return with_scores(batches, old, [Scores(noise(b), noise(b)) for b in batches], entropy_quantile=0.5)


def rows(batches: list[TrainBatch]) -> list[tuple]:
    """Each sequence with all that belongs to it, as plain numbers, in an order of its own."""
    found = []
    for batch in batches:
        lengths = batch.cu_seqlens.diff().tolist()
        columns = [
            value.split(lengths)
            for field in fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor) and field.name != "cu_seqlens"
        ]
        found += [tuple(tuple(part.tolist()) for part in parts) for parts in zip(*columns, strict=True)]
    return sorted(found)


@pytest.mark.parametrize("budget", [100_000, 400, 300, 64, 1])
def test_every_sequence_is_carried_whole(budget: int) -> None:
    batches = step(700)
    again = repack(batches, budget)
    assert rows(again) == rows(batches)
    for batch in again:
        assert batch.num_micro_batches == len(again)
        assert all(getattr(batch, name) == getattr(batches[0], name) for name in COUNTS)
        assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[0] == 0
        assert int(batch.cu_seqlens[-1]) == len(batch.input_ids)
        assert len(batch.input_ids) <= budget or len(batch.cu_seqlens) == 2, "only a lone sequence exceeds the budget"
        starts = batch.position_ids[batch.cu_seqlens[:-1].long()]
        assert not starts.any()
    assert budget > 1 or len(again) == len(LENGTHS)


def test_batches_under_the_budget_are_joined_and_absent_columns_stay_absent() -> None:
    batches = [replace(batch, **dict.fromkeys(OPTIONAL)) for batch in step(64)]
    [joined] = repack(batches, 100_000)
    assert all(getattr(joined, name) is None for name in OPTIONAL)
    assert len(joined.cu_seqlens) == len(LENGTHS) + 1 and joined.num_micro_batches == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 30])
def test_sequences_are_dealt_evenly_and_whole(ranks: int) -> None:
    batches = step(700)
    shares = deal(batches, ranks, 320).shares
    assert len(shares) == ranks
    assert rows([batch for share in shares for batch in share]) == rows(batches)
    assert {batch.num_micro_batches for share in shares for batch in share} == {sum(map(len, shares))}
    tokens = [sum(len(batch.input_ids) for batch in share) for share in shares]
    longest = max(int(batch.cu_seqlens.diff().max()) for batch in batches)
    assert max(tokens) - min(tokens) <= longest  # what longest-first guarantees
    if ranks < 4:
        assert max(tokens) - min(tokens) <= 4  # and what it does with many short sequences to fill in
    assert all(len(batch.input_ids) <= 320 for share in shares for batch in share)


def test_the_longest_goes_first_and_to_the_emptiest_rank() -> None:
    [one] = repack(step(100_000), 100_000)
    lengths = one.cu_seqlens.diff().tolist()
    shares = deal([one], 3, 100_000).shares
    expected: list[list[int]] = [[], [], []]
    for length in sorted(lengths, reverse=True):
        min(expected, key=sum).append(length)
    assert [sorted(share[0].cu_seqlens.diff().tolist(), reverse=True) for share in shares] == expected


def test_the_deal_depends_on_lengths_alone() -> None:
    batches = step(700)
    bare = [replace(batch, advantages=-batch.advantages, old_logprobs=None) for batch in batches]
    one, two = deal(batches, 2, 320).shares, deal(bare, 2, 320).shares
    assert [[b.input_ids.tolist() for b in share] for share in one] == [
        [b.input_ids.tolist() for b in share] for share in two
    ]


@pytest.mark.parametrize("ranks", [1, 2, 5, 30])
def test_scores_come_back_in_the_order_of_the_batches(ranks: int) -> None:
    batches = step(700)
    random.Random(0).shuffle(batches)
    dealt = deal(batches, ranks, 320)
    # What is "scored" names the token itself, so that any exchange shows.
    scored = [[Scores(b.old_logprobs, b.input_ids + b.position_ids * 1000) for b in share] for share in dealt.shares]
    collected = dealt.collect(scored)
    assert len(collected) == len(batches)
    for batch, scores in zip(batches, collected, strict=True):
        assert torch.equal(scores.logprobs, batch.old_logprobs)
        assert torch.equal(scores.entropy, batch.input_ids + batch.position_ids * 1000)


# --- with shared prompts ----------------------------------------------------------------------------------------------


def cost(batch: TrainBatch) -> int:
    """Loss tokens, and those of every prompt once: in this step prompts are as long as their group's number plus 3."""
    lengths = batch.cu_seqlens.diff().tolist()
    heads = [
        tuple(own[: int((~mask).sum())].tolist())
        for own, mask in zip(batch.input_ids.split(lengths), batch.loss_mask.split(lengths), strict=True)
    ]
    assert heads == sorted(heads, key=heads.index), "the sequences of a prompt stand side by side"
    return int(batch.loss_mask.sum()) + sum(map(len, set(heads)))


@pytest.mark.parametrize("budget", [100_000, 700, 310, 64, 1])
def test_packed_again_with_shared_prompts(budget: int) -> None:
    batches = step(700, share=True)
    again = repack(batches, budget, share_prompts=True)
    assert rows(again) == rows(batches)
    assert all(cost(b) <= budget or len(b.cu_seqlens) == 2 for b in again)
    if budget == 100_000:  # every loss token, and prompts of 3, 4, 5, 6 and 7 tokens
        assert [cost(b) for b in again] == [sum(LENGTHS) + 3 + 4 + 5 + 6 + 7]


@pytest.mark.parametrize("ranks", [1, 2, 3, 30])
def test_dealt_with_shared_prompts(ranks: int) -> None:
    batches = step(700, share=True)
    dealt = deal(batches, ranks, 700, share_prompts=True)
    assert rows([b for share in dealt.shares for b in share]) == rows(batches)
    assert all(cost(b) <= 700 for share in dealt.shares for b in share)
    loads = [sum(cost(b) for b in share) for share in dealt.shares]
    assert max(loads) <= (sum(LENGTHS) + 25) / ranks + max(LENGTHS) + 7
    scored = [[Scores(b.old_logprobs, b.input_ids + b.position_ids * 1000) for b in share] for share in dealt.shares]
    for b, scores in zip(batches, dealt.collect(scored), strict=True):
        assert torch.equal(scores.logprobs, b.old_logprobs)


def grouped(groups_of: list[int], prompt: int, completion: int) -> list[TrainBatch]:
    """One micro-batch of groups of completions of one length behind prompts of one length."""
    batches = step(700)
    count = sum(groups_of)
    ids = [[number] * (prompt + completion) for number, size in enumerate(groups_of) for _ in range(size)]
    flat, length = torch.tensor(ids).flatten(), prompt + completion
    mask = (torch.arange(length) >= prompt).repeat(count)
    columns = dict.fromkeys(OPTIONAL)
    bounds = torch.arange(0, count * length + 1, length, dtype=torch.int32)
    places = torch.arange(length).repeat(count)
    return [
        replace(
            batches[0],
            input_ids=flat,
            position_ids=places,
            cu_seqlens=bounds,
            loss_mask=mask,
            advantages=mask.float(),
            **columns,
        )
    ]


@pytest.mark.parametrize(
    ("groups_of", "expected"),
    [
        ([8, 8, 8, 8], [[8, 8], [8, 8]]),  # whole groups: no prompt is paid for twice
        ([8, 8], [[8], [8]]),
        ([8, 8, 8], [[8, 5], [8, 3]]),  # 525 and 475 tokens; 600 and 300 if none were cut
        ([8], [[4], [4]]),  # one group: both ranks pay for its prompt, rather than one of them waiting
    ],
)
def test_groups_are_dealt_whole_where_that_is_balanced(groups_of: list[int], expected: list[list[int]]) -> None:
    shares = deal(grouped(groups_of, 100, 25), 2, 10**6, share_prompts=True).shares
    sizes = [[b.input_ids[b.cu_seqlens[:-1].long()].unique(return_counts=True)[1].tolist() for b in s] for s in shares]
    assert [sorted(size, reverse=True) for [size] in sizes] == expected


@pytest.mark.parametrize("name", ["grpo", "gspo", "dapo", "dr_grpo", "cispo", "luspo", "gmpo"])
def test_the_gradient_is_the_same_however_a_step_is_packed(name: str) -> None:
    algorithm = algorithms.parse({"name": name, "kl_coef": 0.1, "entropy_coef": 0.01, "top_entropy": 0.5})
    weights = model(0)
    batches = step(700, name)
    old = [score(weights, batch)[0].detach() + 0.2 * torch.sin(batch.input_ids.double()) for batch in batches]
    batches = [replace(batch, old_logprobs=o) for batch, o in zip(batches, old, strict=True)]
    whole = step_gradient(weights, batches, algorithm)
    assert whole.norm() > 1e-6
    dealt = [[batch for share in deal(batches, ranks, 320).shares for batch in share] for ranks in (2, 30)]
    dealt += [[batch for share in deal(batches, 3, 320, share_prompts=True).shares for batch in share]]
    cuts = [repack(batches, 320), repack(batches, 10**6), repack(batches, 100, share_prompts=True), *dealt]
    for cut in cuts:
        gradient = step_gradient(weights, cut, algorithm)
        assert (gradient - whole).norm() <= 1e-12 * whole.norm()


def test_bnpo_depends_on_the_cut() -> None:
    """By its definition; if it ever stops to, its row in the table of algorithms is wrong."""
    algorithm = algorithms.parse("bnpo")
    weights, batches = model(0), step(100_000, "bnpo")
    batches = [replace(batch, old_logprobs=None) for batch in batches]
    whole = step_gradient(weights, batches, algorithm)
    assert (step_gradient(weights, repack(batches, 320), algorithm) - whole).norm() > 1e-3 * whole.norm()
