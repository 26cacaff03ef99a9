"""What a micro-batch costs where prompts are shared, by hand, and that nothing is lost in filling them."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rl.packing import Family, families, fill, prompts, tokens
from posttrain.rl.types import TrainBatch


def batch(ids: list[list[int]], first_loss: list[int | None]) -> TrainBatch:
    """Sequences whose loss begins at ``first_loss``; never where that is ``None``."""
    mask = [
        [first is not None and i >= first for i in range(len(own))] for own, first in zip(ids, first_loss, strict=True)
    ]
    flat = torch.tensor([*chain.from_iterable(ids)])
    return TrainBatch(
        input_ids=flat,
        position_ids=torch.cat([torch.arange(len(own)) for own in ids]),
        cu_seqlens=torch.tensor([0, *map(len, ids)]).cumsum(0).int(),
        loss_mask=torch.tensor([*chain.from_iterable(mask)]),
        advantages=torch.zeros(len(flat)),
        num_loss_tokens=1,
        num_sequences=1,
        num_micro_batches=1,
        max_tokens=8,
    )


def test_the_cost_of_a_micro_batch_by_hand() -> None:
    """Prompt 5 6 7 with 2, 1 and 3 more; prompt 5 6, another one, with 4; one that is not trained on."""
    made = batch([[5, 6, 7, 1, 2], [5, 6, 7, 9], [5, 6, 7, 7, 7, 7], [5, 6, 7, 1, 2, 3], [8, 8, 8]], [3, 3, 3, 2, None])
    assert prompts(made) == [[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6], []]
    assert tokens(made, share=True) == (3 + 2 + 1 + 3) + (2 + 4) + 3
    assert tokens(made, share=False) == 24


def test_families_go_by_the_whole_prompt_wherever_it_stands() -> None:
    found = families([(1, 2), (1,), (1, 2), (2, 1), (1,)], [5, 4, 3, 6, 2], share=True)
    assert found == [Family(2, {0: 3, 2: 1}), Family(1, {1: 3, 4: 1}), Family(2, {3: 4})]
    assert [family.tokens for family in found] == [6, 5, 6]
    alone = families([(1, 2), (1,)], [5, 4], share=False)
    assert alone == [Family(0, {0: 5}), Family(0, {1: 4})]


@pytest.mark.parametrize(
    ("budget", "parts"),
    [
        (30, [{0: 4, 1: 7, 2: 2, 3: 5}]),  # 10 + 18 fit
        (28, [{0: 4, 1: 7, 2: 2, 3: 5}]),
        (27, [{0: 4, 1: 7, 3: 5}, {2: 2}]),  # 17 beside the prompt: 7 + 5 + 4, then 2
        (19, [{1: 7, 2: 2}, {0: 4, 3: 5}]),  # 9 beside it: 7 + 2, 5 + 4
        (16, [{1: 7}, {3: 5}, {0: 4, 2: 2}]),  # 6 beside it: 7 does not fit and has its own
        (3, [{1: 7}, {3: 5}, {0: 4}, {2: 2}]),  # not even the prompt fits
    ],
)
def test_a_family_is_cut_where_it_must_and_every_part_pays_for_the_prompt(budget: int, parts: list) -> None:
    assert Family(10, {0: 4, 1: 7, 2: 2, 3: 5}).cut(budget) == [Family(10, added) for added in parts]


def test_micro_batches_by_hand() -> None:
    """Families of 8 (3 + 5), 6 (2 + 4), 9 (1 + 8) and 3 in 12 tokens: 9 + 3, 8, 6. In 14: 9 + 3, 8 + 6."""
    heads = [(1, 1, 1), (2, 2), (3,), (1, 1, 1), (4,), (2, 2)]
    lengths = [5, 5, 9, 6, 3, 3]
    found = families(heads, lengths, share=True)
    assert [family.tokens for family in found] == [8, 6, 9, 3]
    assert fill(found, 12) == [[2, 4], [0, 3], [1, 5]]
    assert fill(found, 14) == [[2, 4], [0, 3, 1, 5]]
    # Of the first family 5 tokens beside a prompt of 3 do not fit into 7: it is cut. 9 has its own.
    assert fill(found, 7) == [[2], [3], [1, 5], [0], [4]]


def test_what_one_prompt_saves() -> None:
    """Eight completions of 256 tokens behind a prompt of 1024: 3072 tokens and not 10240, one micro-batch and not 4."""
    heads, lengths = [(7,) * 1024] * 8, [1280] * 8
    assert len(fill(families(heads, lengths, share=True), 3072)) == 1
    assert len(fill(families(heads, lengths, share=False), 3072)) == 4
    assert len(fill(families(heads, lengths, share=True), 3071)) == 2


SEQUENCES = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), min_size=1, max_size=40)


@given(SEQUENCES, st.integers(1, 80), st.booleans())
def test_everything_is_there_once_and_within_the_budget(made: list, budget: int, share: bool) -> None:
    heads = [(kind,) * (1 + 5 * kind) for kind, _ in made]
    lengths = [len(head) + added for head, (_, added) in zip(heads, made, strict=True)]
    bins = fill(families(heads, lengths, share=share), budget)
    assert sorted(index for members in bins for index in members) == list(range(len(made)))
    for members in bins:
        kinds = [made[index][0] for index in members]
        prompt_tokens = sum(1 + 5 * kind for kind in (set(kinds) if share else kinds))
        assert prompt_tokens + sum(made[index][1] for index in members) <= budget or len(members) == 1
        if share:  # the completions of a prompt stand side by side
            assert len([1 for one, two in pairwise(kinds) if one != two]) == len(set(kinds)) - 1
    if share and budget >= sum(1 + 5 * kind for kind in {k for k, _ in made}) + sum(added for _, added in made):
        assert len(bins) == 1
