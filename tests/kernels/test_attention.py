"""The attention kernels against a float64 softmax under one mask over all tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from posttrain.kernels import reference
from posttrain.kernels.reference.attention import Segments

from .kernel_tests import (
    CAPABILITIES,
    DEVICE,
    INTERPRETED,
    TYPES,
    compiled,
    distance,
    filled_with_nan,
    run_interpreted,
    runs,
)

pytest.importorskip("triton")
from posttrain.kernels import attention as ours  # noqa: E402 - needs triton
from posttrain.kernels import attention_kernels  # noqa: E402
from posttrain.kernels.attention_blocks import key_blocks, query_blocks  # noqa: E402

__all__ = ["filled_with_nan"]

PACKS = {
    "one": ([41], None),
    "apart": ([17, 1, 33, 9], None),
    "group": ([35, 9, 1, 18, 16], [0, 0, 0, 0, 0]),
    "mixed": ([9, 21, 16, 3, 1, 1, 2, 19, 7], [0, 1, 1, 1, 4, 5, 5, 7, 7]),
}
"""Lengths, and for each segment the index of the one with its prompt; "mixed" has whole sequences between groups and a
prompt of one token."""
RULES = [{}, {"window": 13}, {"softcap": 2.0}, {"window": 20, "softcap": 1.5}]
HEADS = [(2, 2, 16), (4, 2, 24), (3, 1, 41)]
"""Query heads, key heads, head dim."""
SCALE = 0.2
SMALL = ours.Kernels(ours.Tiles(32, 16, 4, 2), ours.Tiles(16, 16, 4, 2), ours.Tiles(32, 16, 4, 2))


def test_under_the_interpreter():
    run_interpreted(__file__, at_least=30)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(ours, "TILES", dict.fromkeys(ours.TILES, SMALL))


def sees(lengths, prompts, window=None):
    """bool [T, T]."""
    prompts = torch.tensor(range(len(lengths)) if prompts is None else prompts)
    sizes = torch.tensor(lengths)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    place = torch.cat([torch.arange(length) for length in lengths])
    before = torch.where(prompts == torch.arange(len(lengths)), 0, sizes[prompts])
    position = place + before[segment]
    ahead = position[:, None] - position
    mine = segment[:, None] == segment
    return ((prompts[segment][:, None] == segment) | mine) & (ahead >= 0) & (ahead < (window or math.inf))


def exact(q, k, v, mask, softcap=None, dtype=torch.float64):
    """With the scores written out, head by head."""
    groups = q.shape[1] // k.shape[1]
    outs = []
    for head in range(q.shape[1]):
        query, key, value = q[:, head].to(dtype), k[:, head // groups].to(dtype), v[:, head // groups].to(dtype)
        scores = query @ key.T * SCALE
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        outs.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ value)
    return torch.stack(outs, 1)


def problem(tokens, heads, kv_heads, width, dtype, seed=0):
    """q and v are slices of something wider, as of a fused projection; k has its heads outside; and ∂out."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    q = (2 * draw(tokens, heads + 1, width + 8)).to(DEVICE, dtype)[:, :heads, :width]
    k = (2 * draw(kv_heads, tokens, width)).to(DEVICE, dtype).transpose(0, 1)
    v = draw(tokens, kv_heads + 2, width).to(DEVICE, dtype)[:, 1 : kv_heads + 1]
    grad = draw(tokens, heads, width).to(DEVICE, dtype)
    return q, k, v, grad


def with_gradients(function, tensors, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_close(found, expected, theirs, factor=2.0):
    """An error of at most twice torch's own, output and gradients."""
    for name, one, two, three in zip(("out", "q", "k", "v"), found, expected, theirs):
        assert one.isfinite().all(), name
        floor = 4e-6 if one.dtype == torch.float32 else torch.finfo(one.dtype).eps
        floor *= two.abs().max().item()
        assert distance(one, two) <= factor * distance(three, two) + floor, name


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize(("rule", "heads"), [*zip(RULES, itertools.cycle(HEADS))], ids=str)
def test_error_is_at_most_twice_torchs(pack, rule, heads, dtype, small_tiles, filled_with_nan):
    lengths, prompts = PACKS[pack]
    *tensors, grad = problem(sum(lengths), *heads, dtype)
    segments, mask = Segments.of(lengths, prompts, DEVICE), sees(lengths, prompts, rule.get("window")).to(DEVICE)
    run = lambda *leaves: ours.attention(*leaves, segments, scale=SCALE, **rule)  # noqa: E731
    found = with_gradients(run, tensors, grad)
    expected = with_gradients(lambda *leaves: exact(*leaves, mask, rule.get("softcap")), tensors, grad)
    theirs = with_gradients(lambda *leaves: exact(*leaves, mask, rule.get("softcap"), dtype), tensors, grad)
    assert found[0].dtype == dtype and found[0].is_contiguous()
    assert_close(found, expected, theirs)
