"""One tile of the vocabulary: what stands between a matrix product that makes logits and one that uses them.

Shape letters: T scored tokens, V vocabulary, H hidden, N rows of one block, C columns of one tile.

The logits of a tile are float32 and are passed over once: a program holds a row of them in registers, updates the row's
running statistics and writes the factors of the next product over the logits, in the type of that product's operands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.launch import power_of_2
from posttrain.kernels.reference.logprobs import Head

GROWTH = tl.constexpr(1.0)
"""Nats by which a row's maximum may exceed the reference that its sums are measured from, before they are moved to it.
A factor is then at most e in size, and a sum is passed over two or three times in a whole sweep, not once a tile."""
NUMBERS_A_THREAD = 16
"""Of a row of logits: more spill, fewer have too little under way."""
MOST_COLUMNS = 16384
STATISTICS = 6
"""Of a row: reference, Σ e, Σ e·(x − reference) over all but the target, the target's logit, the slope there, and the
anchor, near the mean of x, that the entropy's factors e·(x − anchor) are measured from: little is left to cancel."""


class Tile(NamedTuple):
    """Logits of N rows and C columns; what is written over them has rows of the same stride."""

    logits: Tensor
    """float32 [N, C], contiguous."""
    factors: Tensor
    """[N, C] over the same memory, in the type of the products' operands."""
    weighted: Tensor
    """[N, C], for the entropy: in the other half of the logits' memory where factors are 16 bits, else beside it."""


def tile_views(memory: Tensor, beside: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tile:
    """A tile in float32 ``memory`` (one dimension), the last part ``beside`` it where it does not fit in."""
    size = rows * columns
    logits = memory[:size].view(rows, columns)
    if dtype == torch.float32:
        return Tile(logits, logits, beside[:size].view(rows, columns))
    halves = memory[:size].view(dtype).view(rows, 2, columns)
    return Tile(logits, halves[:, 0], halves[:, 1])


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """``out (+)= a b``, summed in float32, the type of ``out``; operands of 16 bits on a GPU only."""
    beta = 1 if add else 0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)


def update_statistics(
    tile: Tile, start: int, targets: Tensor, bias: Tensor | None, head: Head, statistics: Tensor, sums: list[Tensor]
) -> None:
    """Take a tile into ``statistics`` [6, N] and, where there are ``sums`` [N, H] of products, write its factors.

    ``sums``, of the tiles before, are moved to the new reference in the rows that got one. One launch and one binary
    whether or not there are sums, so that the statistics are the same bits.
    """
    rows, columns = tile.logits.shape
    block = power_of_2(head.chunk)
    inner, outer = _scales(head)
    _tile_fwd_kernel[(rows,)](
        tile.logits,
        tile.factors,
        tile.weighted,
        sums[0] if sums else tile.logits,
        sums[-1] if sums else tile.logits,
        targets if bias is None else bias,
        targets,
        statistics,
        start,
        columns,
        sums[0].shape[1] if sums else 0,
        len(sums),
        inner,
        outer,
        tile.logits.stride(0),
        tile.factors.stride(0),
        statistics.stride(0),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        BLOCK_C=block,
        BLOCK_H=min(1024, block),
        num_warps=_warps(block),
    )


def write_directions(
    weight: Tensor, targets: Tensor, coefficients: Tensor, sums: list[Tensor], out: list[Tensor]
) -> None:
    """``c₀ w_target + c₁ A`` and, for the entropy, ``c₂ w_target + c₃ A + c₄ B`` [N, H] of sums A and B [N, H];
    ``coefficients`` [5, N].
    """
    rows, width = sums[0].shape
    block = min(1024, power_of_2(width))
    _directions_kernel[(rows, triton.cdiv(width, block))](
        weight,
        targets,
        coefficients,
        sums[0],
        sums[-1],
        out[0],
        out[-1],
        width,
        *weight.stride(),
        coefficients.stride(0),
        sums[0].stride(0),
        out[0].stride(0),
        TWO=len(sums) > 1,
        BLOCK_H=block,
        num_warps=4,
    )


def write_logit_gradients(
    tile: Tile, start: int, targets: Tensor, bias: Tensor | None, head: Head, statistics: Tensor
) -> None:
    """Write the gradient of ``z`` over the logits, in ``tile.factors``. ``statistics`` [6, N]: logprobs, entropy,
    log-probability of the others, log-sum-exp, and the gradients of the first two.
    """
    rows, columns = tile.logits.shape
    block = power_of_2(head.chunk)
    inner, outer = _scales(head)
    _tile_bwd_kernel[(rows,)](
        tile.logits,
        tile.factors,
        targets if bias is None else bias,
        targets,
        statistics,
        start,
        columns,
        inner,
        outer,
        slope(head),
        tile.logits.stride(0),
        tile.factors.stride(0),
        statistics.stride(0),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        BLOCK_C=block,
        num_warps=_warps(block),
    )


def slope(head: Head) -> float:
    """dx/dz but for the softcap's part."""
    return (1.0 if head.scale is None else head.scale) / head.temperature


def _scales(head: Head) -> tuple[float, float]:
    """Factors before and after the softcap; the first is all of it without one."""
    if head.softcap is None:
        return slope(head), 1.0
    return slope(head) * head.temperature / head.softcap, head.softcap / head.temperature


def _warps(block: int) -> int:
    return min(16, max(4, block // (32 * NUMBERS_A_THREAD)))


@triton.jit
def _capped(z: tl.tensor, inner: tl.tensor, outer: tl.tensor, HAS_SOFTCAP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """x of z, and the softcap's part of the slope."""
    if HAS_SOFTCAP:
        s = tl.sigmoid(2 * inner * z)  # tanh y = 2 s − 1 and its derivative 4 s (1 − s)
        return outer * (2 * s - 1), 4 * s * (1 - s)
    else:
        return inner * z, 1.0


@triton.jit(do_not_specialize=["directions", "H", "stride_s"])
def _tile_fwd_kernel(
    z_ptr: tl.tensor,
    e_ptr: tl.tensor,
    f_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    H: tl.tensor,
    directions: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    stride_zn: tl.tensor,
    stride_en: tl.tensor,
    stride_s: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """One row of the tile. e and f lie over z: every store comes after a reduction that needs the whole row of z."""
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < columns
    z = tl.load(z_ptr + row * stride_zn + offs_c, mask=mask_c, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + start + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    x, slope = _capped(z, inner, outer, HAS_SOFTCAP)

    stats = stats_ptr + row
    seen = start > 0
    reference = tl.load(stats, mask=seen, other=float("-inf"))
    total = tl.load(stats + stride_s, mask=seen, other=0.0)
    energy = tl.load(stats + 2 * stride_s, mask=seen, other=0.0)
    target = tl.load(targets_ptr + row) - start
    here = (target >= 0) & (target < columns)
    own_z = tl.load(z_ptr + row * stride_zn + target, mask=here, other=0.0)
    if HAS_BIAS:
        own_z += tl.load(bias_ptr + start + target, mask=here, other=0.0).to(tl.float32)
    own_x, own_slope = _capped(own_z, inner, outer, HAS_SOFTCAP)
    tl.store(stats + 3 * stride_s, own_x, mask=here)
    tl.store(stats + 4 * stride_s, own_slope, mask=here)

    x = tl.where(mask_c & (offs_c != target), x, float("-inf"))
    highest = tl.max(x, 0)
    moves = highest > reference + GROWTH
    moved = tl.where(moves, highest, reference)
    # A row that has seen nothing but its target has no reference yet: it measures from 0.
    origin = tl.where(moved == float("-inf"), 0.0, moved)
    shift = tl.where(reference == float("-inf"), 0.0, reference - origin)
    decay = tl.exp(shift)
    e = tl.exp(x - origin)
    d = tl.where(e > 0, x - origin, 0.0)
    energy = decay * (energy + shift * total) + tl.sum(e * d, 0)
    total = decay * total + tl.sum(e, 0)
    old_anchor = tl.load(stats + 5 * stride_s, mask=seen, other=0.0)
    anchor = tl.where(moves, origin + energy / tl.maximum(total, 1e-30), old_anchor)
    tl.store(stats, moved)
    tl.store(stats + stride_s, total)
    tl.store(stats + 2 * stride_s, energy)
    tl.store(stats + 5 * stride_s, anchor)

    if directions > 0:
        tl.store(e_ptr + row * stride_en + offs_c, (e * slope).to(e_ptr.dtype.element_ty), mask=mask_c)
        if directions > 1:
            f = e * (d + (origin - anchor)) * slope
            tl.store(f_ptr + row * stride_en + offs_c, f.to(f_ptr.dtype.element_ty), mask=mask_c)
        if moves & (reference > float("-inf")):
            for low in range(0, H, BLOCK_H):
                offs_h = low + tl.arange(0, BLOCK_H)
                at, mask_h = row * H + offs_h, offs_h < H
                a = tl.load(a_ptr + at, mask=mask_h, other=0.0)
                if directions > 1:
                    b = tl.load(b_ptr + at, mask=mask_h, other=0.0)
                    tl.store(b_ptr + at, decay * (b + (old_anchor - anchor) * a), mask=mask_h)
                tl.store(a_ptr + at, decay * a, mask=mask_h)


@triton.jit(do_not_specialize=["stride_c"])
def _directions_kernel(
    w_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    c_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    u_ptr: tl.tensor,
    v_ptr: tl.tensor,
    H: tl.tensor,
    stride_wv: tl.tensor,
    stride_wh: tl.tensor,
    stride_c: tl.tensor,
    stride_an: tl.tensor,
    stride_un: tl.tensor,
    TWO: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """A part of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    c = c_ptr + row
    target = tl.load(targets_ptr + row).to(tl.int64)
    w = tl.load(w_ptr + target * stride_wv + offs_h * stride_wh, mask=mask_h, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * stride_an + offs_h, mask=mask_h, other=0.0)
    u = tl.load(c) * w + tl.load(c + stride_c) * a
    tl.store(u_ptr + row * stride_un + offs_h, u.to(u_ptr.dtype.element_ty), mask=mask_h)
    if TWO:
        b = tl.load(b_ptr + row * stride_an + offs_h, mask=mask_h, other=0.0)
        v = tl.load(c + 2 * stride_c) * w + tl.load(c + 3 * stride_c) * a + tl.load(c + 4 * stride_c) * b
        tl.store(v_ptr + row * stride_un + offs_h, v.to(v_ptr.dtype.element_ty), mask=mask_h)


@triton.jit(do_not_specialize=["stride_s"])
def _tile_bwd_kernel(
    z_ptr: tl.tensor,
    g_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    scale: tl.tensor,
    stride_zn: tl.tensor,
    stride_gn: tl.tensor,
    stride_s: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """One row of the tile; the gradient lies over z."""
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < columns
    z = tl.load(z_ptr + row * stride_zn + offs_c, mask=mask_c, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + start + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    x, slope = _capped(z, inner, outer, HAS_SOFTCAP)

    stats = stats_ptr + row
    logprob, entropy = tl.load(stats), tl.load(stats + stride_s)
    log_rest, lse = tl.load(stats + 2 * stride_s), tl.load(stats + 3 * stride_s)
    grad_logprob, grad_entropy = tl.load(stats + 4 * stride_s), tl.load(stats + 5 * stride_s)
    target = tl.load(targets_ptr + row) - start
    # 1 − p of the target from the log-probability of the others: no digits lost when p is near 1.
    own = grad_logprob * tl.exp(log_rest) - grad_entropy * tl.exp(logprob) * (logprob + entropy)
    log_p = x - lse
    p = tl.exp(log_p)
    others = -p * (grad_logprob + grad_entropy * tl.where(p > 0, log_p + entropy, 0.0))
    grad = tl.where(offs_c == target, own, others) * slope * scale
    tl.debug_barrier()  # every thread has its part of z before one writes over it
    tl.store(g_ptr + row * stride_gn + offs_c, grad.to(g_ptr.dtype.element_ty), mask=mask_c)
