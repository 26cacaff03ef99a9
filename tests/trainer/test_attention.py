"""Packed attention against a dense masked softmax written out here."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from posttrain.kernels.reference.attention import Segments
from posttrain.rl.errors import EngineError
from posttrain.trainer import attention
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


# Two prompts, of 5 and 1 tokens, with completions of 3, 1, 6 and 2, 4; and a sequence by itself.
SHARED = Segments.of([5, 3, 1, 6, 7, 1, 2, 4], [0, 0, 0, 0, 4, 5, 5, 5])


def unshared(inputs):
    """The same tokens with every completion behind a prompt of its own, and where each shared token is among them."""
    orders = [[*range(5), *own] for own in (range(5, 8), range(8, 9), range(9, 15))] + [list(range(15, 22))]
    orders += [[22, 23, 24], [22, 25, 26, 27, 28]]
    flat = [token for order in orders for token in order]
    bounds = [0, *torch.tensor([len(order) for order in orders]).cumsum(0).tolist()]
    return [tensor[:, :, flat] for tensor in inputs], bounds, [flat.index(token) for token in range(29)]


def varlen_by_definition(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """torch's varlen_attn as flash attention has it: the last query of a segment sees up to its last key."""
    assert enable_gqa and window_size[1] == 0 and max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
    parts, groups = [], q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(zip(cu_q.tolist(), cu_q.tolist()[1:]), zip(cu_k.tolist(), cu_k.tolist()[1:])):
        keys, values = (tensor[c:d].repeat_interleave(groups, dim=1) for tensor in (k, v))
        distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        scores = torch.einsum("qnd,knd->nqk", q[a:b], keys) * scale
        parts.append(torch.einsum("nqk,knd->qnd", scores.masked_fill(~seen, -math.inf).softmax(-1), values))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 500])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "varlen"])
def test_a_shared_prompt_is_as_good_as_one_for_each(monkeypatch, window, extra):
    if extra == "varlen":
        monkeypatch.setattr(attention, "_varlen_fits", lambda q, v: True)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_definition)
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(1, heads, 29, 8, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    inputs = [draw(6), draw(2), draw(2)]
    options = {"softcap": {"softcap": 0.8}, "sinks": {"s_aux": torch.linspace(-1, 2, 6).double()}}.get(extra, {})
    ours, _ = packed_attention(
        SimpleNamespace(), *inputs, None, scaling=0.4, sliding_window=window, packing=Packing(SHARED), **options
    )
    repeated, bounds, places = unshared(inputs)
    theirs = dense(*repeated, bounds, 0.4, window, options.get("softcap"), options.get("s_aux"))[:, places]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for one, two in zip(
        torch.autograd.grad((ours * weights).sum(), inputs), torch.autograd.grad((theirs * weights).sum(), inputs)
    ):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
CHOICES = [
    # flash attention runs; kernels; shared; softcap; sinks; dtype; torch repeats heads → what is taken
    (True, "triton", False, None, False, HALF, False, "_varlen"),
    (True, "triton", True, None, False, HALF, False, "_triton"),
    (True, "triton", False, 30.0, False, HALF, False, "_triton"),
    (True, "triton", False, None, False, HALF, True, "_triton"),
    (True, "reference", False, None, False, HALF, True, "_varlen"),
    (True, "reference", True, None, False, HALF, False, "_varlen"),
    (True, "reference", True, 30.0, False, HALF, False, "_reference"),
    (False, "triton", False, None, False, torch.float16, False, "_triton"),
    (False, "triton", True, None, False, SINGLE, False, "_triton"),
    (False, "triton", True, None, False, DOUBLE, False, "_reference"),
    (False, "reference", True, None, False, SINGLE, False, "_reference"),
    (True, "triton", True, None, True, HALF, False, "_with_sinks"),
]


@pytest.mark.parametrize(("flash", "kernels", "shared", "softcap", "sinks", "dtype", "repeats", "taken"), CHOICES)
def test_the_choice(monkeypatch, caplog, flash, kernels, shared, softcap, sinks, dtype, repeats, taken):
    monkeypatch.setattr(attention, "_logged", set())
    monkeypatch.setattr(attention, "_varlen_fits", lambda q, v: flash)
    monkeypatch.setattr(attention, "_varlen_groups_heads", lambda: not repeats)
    called = []
    for name in ("_varlen", "_triton", "_reference", "_with_sinks"):
        monkeypatch.setattr(attention, name, lambda q, *rest, name=name: called.append(name) or q)
    segments = Segments.of([2, 1, 1], [0, 0, 0]) if shared else Segments.of([3, 1])
    query, key = torch.zeros(1, 4, 4, 8, dtype=dtype), torch.zeros(1, 2, 4, 8, dtype=dtype)
    options = {"softcap": softcap, "s_aux": torch.zeros(4) if sinks else None}
    with caplog.at_level("INFO", logger="posttrain"):
        for _ in range(2):
            packed_attention(SimpleNamespace(), query, key, key, None, packing=Packing(segments, kernels), **options)
    assert called == [taken, taken]
    assert len(caplog.records) == 1 and ("shared prompts" in caplog.text) == shared


def test_no_tensor_is_copied_on_the_way(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "_reference", lambda q, k, v, *rest: seen.extend([q, k, v]) or q)
    inputs = [torch.randn(1, 4, heads, 8).transpose(1, 2) for heads in (4, 2, 2)]
    packed_attention(SimpleNamespace(), *inputs, None, packing=Packing(Segments.of([4])))
    for given, got in zip(inputs, seen):
        assert got.data_ptr() == given.data_ptr() and got.is_contiguous() and got.shape[0] == 4


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
