"""Causal attention over packed segments that may share a prompt, forward and backward.

Shape letters: T packed tokens, N query heads, K key/value heads, D head dim.

As in FlashAttention-2 (Dao 2023, algorithms 1 and 2): a program keeps a block of queries, walks over the keys it sees
with a running maximum, and leaves the output and the logarithm of each row's sum. The backward pass has two kernels,
one with a block of queries for ∂q, one with a block of keys for ∂k and ∂v; the second walks over all query heads of its
key head, so that nothing is added up by atomics and the bits are the same every time.

A completion's keys are its prompt's and its own, one row of positions in two places of memory; a prompt's readers stand
right behind it, so that to a block of keys they are more queries of the same segment. Neither is ever copied.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.kernels.attention_blocks import key_blocks, query_blocks
from posttrain.kernels.attention_bwd import _attention_bwd_dkdv_kernel, _attention_bwd_dq_kernel
from posttrain.kernels.attention_fwd import _attention_fwd_kernel
from posttrain.kernels.launch import gpu, power_of_2
from posttrain.kernels.reference.attention import Segments

_LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """Of one kernel: rows it keeps, rows of a step, warps, stages of the pipeline."""

    kept: int
    step: int
    warps: int
    stages: int


class Kernels(NamedTuple):
    """Tiles of the three kernels."""

    forward: Tiles
    query_gradient: Tiles
    key_gradient: Tiles


TILES: dict[tuple[str, int], Kernels] = {
    ("hopper", 64): Kernels(Tiles(128, 128, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2)),
    ("hopper", 128): Kernels(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2)),
    ("hopper", 256): Kernels(Tiles(128, 32, 8, 3), Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2)),
    ("ampere", 64): Kernels(Tiles(128, 64, 4, 3), Tiles(128, 64, 4, 3), Tiles(128, 32, 4, 3)),
    ("ampere", 128): Kernels(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2)),
    ("ampere", 256): Kernels(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2)),
    ("ada", 64): Kernels(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    ("ada", 128): Kernels(Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2)),
    ("ada", 256): Kernels(Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
    ("scalar", 64): Kernels(Tiles(32, 32, 4, 1), Tiles(32, 16, 4, 1), Tiles(32, 32, 8, 1)),
    ("scalar", 128): Kernels(Tiles(32, 32, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
    ("scalar", 256): Kernels(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
}
"""By what multiplies matrices, and the head dim rounded up to a power of two. "ada" has 99 KiB of shared memory.
"scalar": no tensor cores, for float32 on any GPU and everything on compute capability 7.5, whose tensor cores Triton
does not use from 3.3 on: correct there, but slower than torch's attention, and no room for float32 at 256."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention [T, N, D] inside every segment and over its prompt; gradients for q, k and v.

    ``q`` [T, N, D], ``k`` and ``v`` [T, K, D], N a multiple of K, D up to 256, float16, bfloat16 or float32, any
    strides; scores are q·k·``scale``. ``window`` W lets a token see itself and the W − 1 positions before it;
    ``softcap`` bends scores to ``softcap·tanh(score / softcap)``.
    """
    assert k.shape == v.shape and q.shape[0] == k.shape[0] == segments.bounds[-1], "q [T, N, D], k and v [T, K, D]"
    assert q.shape[2] == k.shape[2] <= 256 and q.shape[1] % k.shape[1] == 0, "heads"
    assert scale > 0 and q.dtype == k.dtype == v.dtype
    if window is not None and window >= segments.max_context:
        window = None
    return _Attention.apply(q, k, v, segments, _Rule(scale, window, softcap))


class _Rule(NamedTuple):
    """How scores become weights: 2 to the power of ``factor·s − lse``, s = q·k, or tanh(``inner``·q·k) under a cap."""

    scale: float
    window: int | None
    softcap: float | None

    @property
    def inner(self) -> float:
        return 1.0 if self.softcap is None else self.scale / self.softcap

    @property
    def factor(self) -> float:
        return (self.scale if self.softcap is None else self.softcap) * _LOG2_E


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: _Rule) -> Tensor:
        q, k, v = (_even(tensor) for tensor in (q, k, v))
        out, lse = _forward(q, k, v, segments, rule)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.rule = segments, rule
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *_backward(q, k, v, out, lse, _even(grad), ctx.segments, ctx.rule), None, None


def _even(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: _Rule) -> tuple[Tensor, Tensor]:
    """The output and, in base 2, the logarithm of each row's sum: float32 [N, T]."""
    (tokens, heads, _), tiles = q.shape, tiles_of(q).forward
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    blocks = query_blocks(segments, tiles.kept)
    if len(blocks):
        _attention_fwd_kernel[(len(blocks), heads)](
            *(q, k, v, out, lse, blocks, *_sizes(q, k, v, rule)),
            **_constants(q, rule, tiles),
            BLOCK_M=tiles.kept,
            BLOCK_N=tiles.step,
        )
    return out, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, segments: Segments, rule: _Rule
) -> tuple[Tensor, Tensor, Tensor]:
    (_, heads, _), kv_heads, tiles = q.shape, k.shape[1], tiles_of(q)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    queries = query_blocks(segments, tiles.query_gradient.kept)
    keys = key_blocks(segments, tiles.key_gradient.kept, rule.window)
    parts = head_parts(heads // kv_heads, gpu(q.device).processors / (keys.equal_programs * kv_heads or 1))
    shape, dtype = (k.shape, k.dtype) if parts == 1 else ((parts, *k.shape), torch.float32)
    grad_k, grad_v = (torch.empty(shape, dtype=dtype, device=k.device) for _ in range(2))
    if len(queries):
        sizes = (*_sizes(q, k, v, rule), rule.scale, grad.stride(0), grad.stride(1))
        _attention_bwd_dq_kernel[(len(queries), heads)](
            *(q, k, v, out, grad, lse, delta, grad_q, queries, *sizes),
            **_constants(q, rule, tiles.query_gradient),
            BLOCK_M=tiles.query_gradient.kept,
            BLOCK_N=tiles.query_gradient.step,
        )
        _attention_bwd_dkdv_kernel[(len(keys.blocks), kv_heads * parts)](
            *(q, k, v, grad, lse, delta, grad_k, grad_v, keys.blocks, keys.visits, *sizes, parts),
            **_constants(q, rule, tiles.key_gradient),
            BLOCK_M=tiles.key_gradient.step,
            BLOCK_N=tiles.key_gradient.kept,
        )
    if parts > 1:
        grad_k, grad_v = grad_k.sum(0).to(k.dtype), grad_v.sum(0).to(v.dtype)
    return grad_q, grad_k, grad_v


def tiles_of(q: Tensor) -> Kernels:
    """From the table, for q's type, head dim and device."""
    capability = gpu(q.device).capability
    if q.dtype == torch.float32 or capability < (8, 0):
        kind = "scalar"
    elif capability in {(8, 0), (8, 7)}:
        kind = "ampere"
    else:
        kind = "ada" if capability[0] in {8, 12} else "hopper"
    return TILES[kind, max(64, power_of_2(q.shape[2]))]


def head_parts(group: int, wanted: float) -> int:
    """Into how many programs the query heads of a key head are divided: as few as keep all processors at work."""
    return next((parts for parts in range(1, group) if group % parts == 0 and parts >= wanted), group)


def _sizes(q: Tensor, k: Tensor, v: Tensor, rule: _Rule) -> tuple[int | float, ...]:
    strides = (stride for tensor in (q, k, v) for stride in tensor.stride()[:2])
    return q.shape[0], q.shape[1], k.shape[1], rule.window or 0, rule.inner, rule.factor, *strides


def _constants(q: Tensor, rule: _Rule, tiles: Tiles) -> dict[str, Any]:
    width = q.shape[2]
    return {
        "HEAD_DIM": width,
        "BLOCK_D": max(16, power_of_2(width)),
        "WINDOW": rule.window is not None,
        "SOFTCAP": rule.softcap is not None,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
