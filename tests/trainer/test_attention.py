"""Packed attention against a dense masked softmax written out here."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from posttrain.kernels.reference.attention import Segments
from posttrain.rl.errors import EngineError
from posttrain.trainer.attention import Packing, packed_attention

BOUNDS = [0, 1, 6, 6, 17]


def dense(query, key, value, bounds, scale, window=None, softcap=None, sinks=None):
    """Block-diagonal causal attention over all tokens at once."""
    tokens = query.shape[2]
    owner = torch.bucketize(torch.arange(tokens), torch.tensor(bounds[1:]), right=True)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    seen = (owner[:, None] == owner[None]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    groups = query.shape[1] // key.shape[1]
    key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
    scores = torch.einsum("bnqd,bnkd->bnqk", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(seen, scores, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    return torch.einsum("bnqk,bnkd->bqnd", weights / total, value)


@pytest.mark.parametrize("window", [None, 1, 3, 11, 500])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_equals_dense_block_diagonal_attention(window, extra):
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(1, heads, 17, 8, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    inputs = [draw(6), draw(2), draw(2)]
    options = {"plain": {}, "softcap": {"softcap": 0.8}, "sinks": {"s_aux": torch.linspace(-1, 2, 6).double()}}[extra]
    packing = Packing(Segments.of([1, 5, 0, 11]))
    ours, _ = packed_attention(
        SimpleNamespace(), *inputs, None, scaling=0.4, sliding_window=window, packing=packing, dropout=0.0, **options
    )
    theirs = dense(*inputs, BOUNDS, 0.4, window, options.get("softcap"), options.get("s_aux"))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for one, two in zip(
        torch.autograd.grad((ours * weights).sum(), inputs), torch.autograd.grad((theirs * weights).sum(), inputs)
    ):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (SimpleNamespace(), {"position_bias": torch.zeros(1)}, "position_bias"),
        (SimpleNamespace(), {"dropout": 0.1}, "dropout"),
        (SimpleNamespace(is_causal=False), {}, "not causal"),
        (SimpleNamespace(), {"packing": None}, "packed sequences"),
    ],
)
def test_what_it_does_not_know_is_refused(module, options, message):
    tensor = torch.zeros(1, 1, 4, 8)
    packing = Packing(Segments.of([4]))
    with pytest.raises(EngineError, match=message):
        packed_attention(module, tensor, tensor, tensor, None, **({"packing": packing} | options))
