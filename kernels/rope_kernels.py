"""The kernels of rotary position embedding; launched by ``rope``.

Shape letters: T packed tokens, N query heads, K key heads, D head dim, R rotated dims, the first of D: HALF pairs of
them, and REST others. ``_1`` and ``_2`` are the first and the second of each pair, ``_r`` the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_pairs(
    ptrs: tl.tensor, mask_n: tl.tensor, HALF: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """First and second of each pair [heads, pairs] in float32; ``ptrs`` [heads]."""
    if INTERLEAVED:
        offs_d = tl.arange(0, 2 * BLOCK_P)
        mask = mask_n[:, None] & (offs_d < 2 * HALF)[None, :]
        both = tl.load(ptrs[:, None] + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (ptrs.shape[0], BLOCK_P, 2)))
    else:
        offs_p = tl.arange(0, BLOCK_P)
        mask = mask_n[:, None] & (offs_p < HALF)[None, :]
        first = tl.load(ptrs[:, None] + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(ptrs[:, None] + HALF + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(
    ptrs: tl.tensor,
    mask_n: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    dtype: tl.constexpr = ptrs.dtype.element_ty
    if INTERLEAVED:
        offs_d = tl.arange(0, 2 * BLOCK_P)
        mask = mask_n[:, None] & (offs_d < 2 * HALF)[None, :]
        both = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), (ptrs.shape[0], 2 * BLOCK_P))
        tl.store(ptrs[:, None] + offs_d[None, :], both, mask=mask)
    else:
        offs_p = tl.arange(0, BLOCK_P)
        mask = mask_n[:, None] & (offs_p < HALF)[None, :]
        tl.store(ptrs[:, None] + offs_p[None, :], first.to(dtype), mask=mask)
        tl.store(ptrs[:, None] + HALF + offs_p[None, :], second.to(dtype), mask=mask)


@triton.jit
def _load_row(
    ptr: tl.tensor, HALF: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """First and second of each pair [pairs] of one row in float32."""
    if INTERLEAVED:
        offs_d = tl.arange(0, 2 * BLOCK_P)
        both = tl.load(ptr + offs_d, mask=offs_d < 2 * HALF, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (BLOCK_P, 2)))
    else:
        offs_p = tl.arange(0, BLOCK_P)
        first = tl.load(ptr + offs_p, mask=offs_p < HALF, other=0.0).to(tl.float32)
        second = tl.load(ptr + HALF + offs_p, mask=offs_p < HALF, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _rotate_heads(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    stride_xn: tl.tensor,
    stride_on: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    N: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """All heads of one token, from ``x_ptr`` to ``out_ptr``."""
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < REST
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        x_ptrs = x_ptr + offs_n.to(tl.int64) * stride_xn
        out_ptrs = out_ptr + offs_n.to(tl.int64) * stride_on
        first, second = _load_pairs(x_ptrs, mask_n, HALF, BLOCK_P, INTERLEAVED)
        if REST > 0:
            rest_ptrs = x_ptrs[:, None] + 2 * HALF + offs_r[None, :]
            rest = tl.load(rest_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0).to(tl.float32)
        if NORM:
            weight_1, weight_2 = _load_row(weight_ptr, HALF, BLOCK_P, INTERLEAVED)
            squares = tl.sum(first * first + second * second, 1)
            if REST > 0:
                squares += tl.sum(rest * rest, 1)
            scale = tl.rsqrt(squares / (2 * HALF + REST) + eps)[:, None]
            first *= scale * (weight_1 + offset)[None, :]
            second *= scale * (weight_2 + offset)[None, :]
            if REST > 0:
                weight_r = tl.load(weight_ptr + 2 * HALF + offs_r, mask=mask_r, other=0.0).to(tl.float32)
                rest *= scale * (weight_r + offset)[None, :]
        turned_1 = first * cos[None, :] - second * sin[None, :]
        turned_2 = second * cos[None, :] + first * sin[None, :]
        _store_pairs(out_ptrs, mask_n, turned_1, turned_2, HALF, BLOCK_P, INTERLEAVED)
        if REST > 0:
            rest_ptrs = out_ptrs[:, None] + 2 * HALF + offs_r[None, :]
            tl.store(rest_ptrs, rest.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_r[None, :])


@triton.jit
def rope_fwd_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    stride_qt: tl.tensor,
    stride_qn: tl.tensor,
    stride_kt: tl.tensor,
    stride_kn: tl.tensor,
    stride_qot: tl.tensor,
    stride_qon: tl.tensor,
    stride_kot: tl.tensor,
    stride_kon: tl.tensor,
    stride_ct: tl.tensor,
    stride_st: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """One token. Outputs may lie where the inputs do: a tile is read before it is written."""
    t = tl.program_id(0).to(tl.int64)
    cos, _ = _load_row(cos_ptr + t * stride_ct, HALF, BLOCK_P, INTERLEAVED)
    sin, _ = _load_row(sin_ptr + t * stride_st, HALF, BLOCK_P, INTERLEAVED)
    if INVERSE:
        sin = -sin
    q_ptr += t * stride_qt
    q_out_ptr += t * stride_qot
    k_ptr += t * stride_kt
    k_out_ptr += t * stride_kot
    # fmt: off
    _rotate_heads(q_ptr, q_out_ptr, q_weight_ptr, cos, sin, stride_qn, stride_qon, eps, offset,
                  N, HALF, REST, NORM, INTERLEAVED, BLOCK_N, BLOCK_P, BLOCK_R)
    _rotate_heads(k_ptr, k_out_ptr, k_weight_ptr, cos, sin, stride_kn, stride_kon, eps, offset,
                  K, HALF, REST, NORM, INTERLEAVED, BLOCK_K, BLOCK_P, BLOCK_R)
    # fmt: on


@triton.jit
def _norm_heads_backward(
    grad_ptr: tl.tensor,
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    stride_gn: tl.tensor,
    stride_xn: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    acc_1: tl.tensor,
    acc_2: tl.tensor,
    acc_r: tl.tensor,
    N: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """All heads of one token: the gradient turned back, then through the norm; the weights' sums with it added.

    With n = x s, s = (mean(x²) + eps)^-½ and g = turned back · (weight + offset): dx = s (g − n mean(g n)).
    """
    D: tl.constexpr = 2 * HALF + REST
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < REST
    weight_1, weight_2 = _load_row(weight_ptr, HALF, BLOCK_P, INTERLEAVED)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask_nr = mask_n[:, None] & mask_r[None, :]
        grad_ptrs = grad_ptr + offs_n.to(tl.int64) * stride_gn
        x_ptrs = x_ptr + offs_n.to(tl.int64) * stride_xn
        out_ptrs = out_ptr + offs_n * D
        grad_1, grad_2 = _load_pairs(grad_ptrs, mask_n, HALF, BLOCK_P, INTERLEAVED)
        x_1, x_2 = _load_pairs(x_ptrs, mask_n, HALF, BLOCK_P, INTERLEAVED)
        squares = tl.sum(x_1 * x_1 + x_2 * x_2, 1)
        if REST > 0:
            x_r = tl.load(x_ptrs[:, None] + 2 * HALF + offs_r[None, :], mask=mask_nr, other=0.0).to(tl.float32)
            g_r = tl.load(grad_ptrs[:, None] + 2 * HALF + offs_r[None, :], mask=mask_nr, other=0.0).to(tl.float32)
            squares += tl.sum(x_r * x_r, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        n_1, n_2 = x_1 * scale, x_2 * scale
        g_1 = grad_1 * cos[None, :] + grad_2 * sin[None, :]
        g_2 = grad_2 * cos[None, :] - grad_1 * sin[None, :]
        if WEIGHT_GRADIENT:
            acc_1 += tl.sum(g_1 * n_1, 0)
            acc_2 += tl.sum(g_2 * n_2, 0)
        g_1 *= (weight_1 + offset)[None, :]
        g_2 *= (weight_2 + offset)[None, :]
        mean = tl.sum(g_1 * n_1 + g_2 * n_2, 1) / D
        if REST > 0:
            n_r = x_r * scale
            if WEIGHT_GRADIENT:
                acc_r += tl.sum(g_r * n_r, 0)
            weight_r = tl.load(weight_ptr + 2 * HALF + offs_r, mask=mask_r, other=0.0).to(tl.float32)
            g_r *= (weight_r + offset)[None, :]
            mean += tl.sum(g_r * n_r, 1) / D
            grad_r = scale * (g_r - n_r * mean[:, None])
            rest_ptrs = out_ptrs[:, None] + 2 * HALF + offs_r[None, :]
            tl.store(rest_ptrs, grad_r.to(out_ptr.dtype.element_ty), mask=mask_nr)
        g_1 = scale * (g_1 - n_1 * mean[:, None])
        g_2 = scale * (g_2 - n_2 * mean[:, None])
        _store_pairs(out_ptrs, mask_n, g_1, g_2, HALF, BLOCK_P, INTERLEAVED)
    return acc_1, acc_2, acc_r


@triton.jit
def _store_sums(
    ptr: tl.tensor,
    acc_1: tl.tensor,
    acc_2: tl.tensor,
    acc_r: tl.tensor,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    offs_p = tl.arange(0, BLOCK_P)
    offs_r = tl.arange(0, BLOCK_R)
    if INTERLEAVED:
        tl.store(ptr + 2 * offs_p, acc_1, mask=offs_p < HALF)
        tl.store(ptr + 2 * offs_p + 1, acc_2, mask=offs_p < HALF)
    else:
        tl.store(ptr + offs_p, acc_1, mask=offs_p < HALF)
        tl.store(ptr + HALF + offs_p, acc_2, mask=offs_p < HALF)
    tl.store(ptr + 2 * HALF + offs_r, acc_r, mask=offs_r < REST)


@triton.jit(do_not_specialize=["T"])
def norm_rope_bwd_kernel(
    grad_q_ptr: tl.tensor,
    grad_k_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    q_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    T: tl.tensor,
    stride_gqt: tl.tensor,
    stride_gqn: tl.tensor,
    stride_gkt: tl.tensor,
    stride_gkn: tl.tensor,
    stride_qt: tl.tensor,
    stride_qn: tl.tensor,
    stride_kt: tl.tensor,
    stride_kn: tl.tensor,
    stride_ct: tl.tensor,
    stride_st: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """One token, or for the weights' gradients each of a program's tokens in turn; what is written is contiguous."""
    D: tl.constexpr = 2 * HALF + REST
    q_1, q_2 = tl.zeros((BLOCK_P,), dtype=tl.float32), tl.zeros((BLOCK_P,), dtype=tl.float32)
    k_1, k_2 = tl.zeros((BLOCK_P,), dtype=tl.float32), tl.zeros((BLOCK_P,), dtype=tl.float32)
    q_r, k_r = tl.zeros((BLOCK_R,), dtype=tl.float32), tl.zeros((BLOCK_R,), dtype=tl.float32)
    for token in range(tl.program_id(0), T, tl.num_programs(0)):
        t = tl.cast(token, tl.int64)
        cos, _ = _load_row(cos_ptr + t * stride_ct, HALF, BLOCK_P, INTERLEAVED)
        sin, _ = _load_row(sin_ptr + t * stride_st, HALF, BLOCK_P, INTERLEAVED)
        # fmt: off
        q_1, q_2, q_r = _norm_heads_backward(
            grad_q_ptr + t * stride_gqt, q_ptr + t * stride_qt, q_out_ptr + t * N * D, q_weight_ptr, cos, sin,
            stride_gqn, stride_qn, eps, offset, q_1, q_2, q_r,
            N, HALF, REST, WEIGHT_GRADIENT, INTERLEAVED, BLOCK_N, BLOCK_P, BLOCK_R)
        k_1, k_2, k_r = _norm_heads_backward(
            grad_k_ptr + t * stride_gkt, k_ptr + t * stride_kt, k_out_ptr + t * K * D, k_weight_ptr, cos, sin,
            stride_gkn, stride_kn, eps, offset, k_1, k_2, k_r,
            K, HALF, REST, WEIGHT_GRADIENT, INTERLEAVED, BLOCK_K, BLOCK_P, BLOCK_R)
        # fmt: on
    if WEIGHT_GRADIENT:
        q_sums_ptr = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * D
        _store_sums(q_sums_ptr, q_1, q_2, q_r, HALF, REST, INTERLEAVED, BLOCK_P, BLOCK_R)
        _store_sums(q_sums_ptr + D, k_1, k_2, k_r, HALF, REST, INTERLEAVED, BLOCK_P, BLOCK_R)
