"""The reference attention against a float64 softmax under one mask over all tokens, written out rule by rule."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.kernels.reference.attention import Segments, attention

PACKS = {
    "one": ([7], None),
    "apart": ([5, 1, 9], None),
    "group": ([6, 3, 1, 5], [0, 0, 0, 0]),
    "mixed": ([4, 5, 2, 3, 1, 3, 2, 6], [0, 1, 1, 1, 4, 5, 5, 7]),
    "empty segments": ([3, 0, 4, 0, 2], [0, 1, 2, 2, 2]),
}
"""Lengths, and for each segment the index of the one with its prompt."""
RULES = [{}, {"window": 3}, {"softcap": 2.0}, {"window": 4, "softcap": 1.5}]


def sees(lengths, prompts, window=None):
    """bool [T, T], token by token."""
    prompts = prompts or list(range(len(lengths)))
    tokens = []  # segment, position
    for index, length in enumerate(lengths):
        before = lengths[prompts[index]] if prompts[index] != index else 0
        tokens += [(index, before + place) for place in range(length)]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for row, (segment, position) in enumerate(tokens):
        for column, (other, earlier) in enumerate(tokens):
            near = window is None or position - earlier < window
            mask[row, column] = other in (segment, prompts[segment]) and earlier <= position and near
    return mask


def brute_force(q, k, v, mask, scale, softcap=None):
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("tnd,snd->nts", q, k.repeat_interleave(groups, 1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum(
        "nts,snd->tnd", scores.masked_fill(~mask, -math.inf).softmax(-1), v.repeat_interleave(groups, 1)
    )


def problem(tokens, heads, kv_heads, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(tokens, n, width, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    return draw(heads), draw(kv_heads), draw(kv_heads)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_values_and_gradients_equal_brute_force(pack, rule, heads, kv_heads):
    lengths, prompts = PACKS[pack]
    leaves = problem(sum(lengths), heads, kv_heads, 5)
    ours = attention(*leaves, Segments.of(lengths, prompts), scale=0.6, **rule)
    mask = sees(lengths, prompts, rule.get("window"))
    theirs = brute_force(*leaves, mask, 0.6, rule.get("softcap"))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, two in zip(
        torch.autograd.grad((ours * weights).sum(), leaves), torch.autograd.grad((theirs * weights).sum(), leaves)
    ):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


def test_a_shared_prompt_gives_what_each_completion_has_behind_its_own_copy():
    q, k, v = problem(11, 2, 1, 4)
    shared = attention(q, k, v, Segments.of([5, 4, 2], [0, 0, 0]), scale=0.5, window=6)
    for start, stop in [(5, 9), (9, 11)]:
        rows = torch.tensor([*range(5), *range(start, stop)])
        own = attention(q[rows], k[rows], v[rows], Segments.of([len(rows)]), scale=0.5, window=6)
        torch.testing.assert_close(own[:5], shared[:5])
        torch.testing.assert_close(own[5:], shared[start:stop])


def test_segments_by_hand():
    segments = Segments.of([3, 2, 1, 4, 2, 5], [0, 0, 0, 3, 4, 4])
    assert segments.cu_seqlens.tolist() == [0, 3, 5, 6, 10, 12, 17] == list(segments.bounds)
    assert segments.prefix.tolist() == [0, 0, 0, 3, 4, 4] == list(segments.prompts)
    assert segments.readers.tolist() == [6, 5, 6, 10, 17, 17]
    assert (segments.max_length, segments.max_context) == (5, 7)
    assert segments.cu_seqlens.dtype == segments.prefix.dtype == segments.readers.dtype == torch.int32


@pytest.mark.parametrize("prompts", [[0, 1, 0], [1, 1, 1], [0, 0, 1]], ids=str)
def test_a_completion_must_follow_a_prompt_that_has_none(prompts):
    with pytest.raises(AssertionError):
        Segments.of([2, 2, 2], prompts)
