"""Rotary position embedding of q and k in one launch, alone or after an RMS norm of each head.

Shape letters: T packed tokens, N query heads, K key heads, D head dim, R rotated dims, the first of D.

Bound by memory: a program reads all heads of a token once and writes them once. Both of a pair are in one thread's
registers, as are whole heads in a few threads', so a norm costs no traffic and its backward keeps q and k alone. The
backward of the rotation is the same kernel with the angles negated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.launch import gpu, power_of_2


class _Tiles(NamedTuple):
    elements: int
    """Of a tile, at most: heads of one token."""
    per_thread: int
    """Elements of each tensor that a thread holds."""


FORWARD = _Tiles(4096, 32)
NORM_BACKWARD = _Tiles(4096, 16)
PROGRAMS = 4
"""On a multiprocessor, where the weights' gradients are summed: each walks over its share of the tokens."""


class _Rotation(NamedTuple):
    cos: Tensor
    sin: Tensor
    interleaved: bool
    inverse: bool = False


class _Norm(NamedTuple):
    q_weight: Tensor
    k_weight: Tensor
    eps: float
    offset: float


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """q [T, N, D] and k [T, K, D] with their first R dims rotated in pairs, computed in float32 and rounded once.

    ``cos`` and ``sin`` [T, R], any type, hold a pair's angle at both of its columns: i and i + R/2 (Llama: two equal
    halves), or, ``interleaved``, 2i and 2i + 1 (GPT-J, Cohere: every angle twice in a row); one of the two is read.
    q and k may have any strides; results are contiguous.
    """
    return _Rope.apply(q, k, _Rotation(cos, sin, interleaved))


def norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    offset: float = 0.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rope`` of the RMS norm of each head times ``weight + offset`` [D] (Qwen3; Gemma 3 with offset 1.0)."""
    return _NormRope.apply(q, k, q_weight, k_weight, (eps, offset), _Rotation(cos, sin, interleaved))


def rope_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """``rope``, or with ``inverse`` its backward, written over q and k; no gradient.

    For q and k that are the caller's own: autograd must not have saved them, and a gradient that autograd handed over
    may be someone else's too, which is why ``rope`` itself never does this.
    """
    assert q.stride(-1) == 1 and k.stride(-1) == 1, "the last dim of q and k is contiguous"
    _launch((q, k), (q, k), _Rotation(cos, sin, interleaved, inverse), None)
    return q, k


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, rotation: _Rotation) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rotation.cos, rotation.sin)
        ctx.interleaved = rotation.interleaved
        outputs = _outputs(q, k)
        _launch((q, k), outputs, rotation, None)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        grads = _outputs(grad_q, grad_k)
        _launch((grad_q, grad_k), grads, _Rotation(*ctx.saved_tensors, ctx.interleaved, inverse=True), None)
        return *grads, None


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        constants: tuple[float, float],
        rotation: _Rotation,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, q_weight, k_weight, rotation.cos, rotation.sin)
        ctx.constants, ctx.interleaved = constants, rotation.interleaved
        outputs = _outputs(q, k)
        _launch((q, k), outputs, rotation, _Norm(q_weight, k_weight, *constants))
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        rotation, norm = _Rotation(cos, sin, ctx.interleaved), _Norm(q_weight, k_weight, *ctx.constants)
        wanted = ctx.needs_input_grad[2:4]
        grads = _outputs(q, k)
        sums = _launch_norm_backward((grad_q, grad_k), (q, k), grads, rotation, norm, any(wanted))
        of_weights = (
            total.to(weight.dtype) if want else None
            for total, weight, want in zip(sums, (q_weight, k_weight), wanted, strict=True)
        )
        return *grads, *of_weights, None, None


def _outputs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous, whatever q and k are."""
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


def _launch(
    inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], rotation: _Rotation, norm: _Norm | None
) -> None:
    q, k = (_dense(x) for x in inputs)
    cos, sin = _dense(rotation.cos), _dense(rotation.sin)
    blocks, warps = _blocks(q, k, cos, FORWARD)
    if inputs is outputs:
        blocks["REST"] = 0  # is where it belongs
    _rope_fwd_kernel[(q.shape[0],)](
        q,
        k,
        outputs[0],
        outputs[1],
        cos,
        sin,
        q if norm is None else norm.q_weight.contiguous(),
        q if norm is None else norm.k_weight.contiguous(),
        *q.stride()[:2],
        *k.stride()[:2],
        *outputs[0].stride()[:2],
        *outputs[1].stride()[:2],
        cos.stride(0),
        sin.stride(0),
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.offset,
        NORM=norm is not None,
        INTERLEAVED=rotation.interleaved,
        INVERSE=rotation.inverse,
        num_warps=warps,
        **blocks,
    )


def _launch_norm_backward(
    grads: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    rotation: _Rotation,
    norm: _Norm,
    weight_gradient: bool,
) -> Tensor:
    """Writes the gradients of q and k to ``outputs``; those of the weights [2, D], zero where not asked for."""
    (grad_q, grad_k), (q, k) = (tuple(_dense(x) for x in pair) for pair in (grads, inputs))
    cos, sin = _dense(rotation.cos), _dense(rotation.sin)
    blocks, warps = _blocks(q, k, cos, NORM_BACKWARD)
    programs = min(q.shape[0], PROGRAMS * gpu(q.device).processors) if weight_gradient else q.shape[0]
    # Each program's own sums, added up in a fixed order: the same bits every time.
    sums = torch.empty(programs if weight_gradient else 0, 2, q.shape[2], dtype=torch.float32, device=q.device)
    _norm_rope_bwd_kernel[(programs,)](
        grad_q,
        grad_k,
        q,
        k,
        outputs[0],
        outputs[1],
        cos,
        sin,
        norm.q_weight.contiguous(),
        norm.k_weight.contiguous(),
        sums,
        q.shape[0],
        *grad_q.stride()[:2],
        *grad_k.stride()[:2],
        *q.stride()[:2],
        *k.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        norm.eps,
        norm.offset,
        WEIGHT_GRADIENT=weight_gradient,
        INTERLEAVED=rotation.interleaved,
        num_warps=warps,
        **blocks,
    )
    return sums.sum(0)


def _dense(x: Tensor) -> Tensor:
    """With a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _blocks(q: Tensor, k: Tensor, cos: Tensor, tiles: _Tiles) -> tuple[dict[str, int], int]:
    """The kernels' sizes, and warps."""
    (tokens, heads, width), rotated = q.shape, cos.shape[1]
    assert q.dtype == k.dtype and q.dtype in {torch.float16, torch.bfloat16, torch.float32}, f"{q.dtype}, {k.dtype}"
    assert k.shape[0] == tokens and k.shape[2] == width, f"q {tuple(q.shape)}, k {tuple(k.shape)}"
    assert rotated % 2 == 0 and 0 < rotated <= width and len(cos) == tokens, f"cos {tuple(cos.shape)}"
    pairs, rest = power_of_2(rotated // 2), power_of_2(width - rotated)
    most = max(1, tiles.elements // (2 * pairs + rest * (rotated < width)))
    most = 1 << (most.bit_length() - 1)
    sizes = {"HALF": rotated // 2, "REST": width - rotated, "BLOCK_P": pairs, "BLOCK_R": rest}
    sizes |= {"N": heads, "K": k.shape[1]}
    sizes |= {"BLOCK_N": min(power_of_2(heads), most), "BLOCK_K": min(power_of_2(k.shape[1]), most)}
    warps = sizes["BLOCK_N"] * 2 * pairs // (32 * tiles.per_thread)
    return sizes, max(1, min(warps, 8))


@triton.jit
def _columns(HALF: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Of the first and of the second of each pair."""
    offs_p = tl.arange(0, BLOCK_P)
    if INTERLEAVED:
        first = 2 * offs_p
        second = 2 * offs_p + 1
    else:
        first = offs_p
        second = HALF + offs_p
    return first, second


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
    first, second = _columns(HALF, BLOCK_P, INTERLEAVED)
    mask = tl.arange(0, BLOCK_P) < HALF
    return (
        tl.load(ptr + first, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + second, mask=mask, other=0.0).to(tl.float32),
    )


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
            squares = tl.sum(first * first + second * second, 1)
            weight_1, weight_2 = _load_row(weight_ptr, HALF, BLOCK_P, INTERLEAVED)
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
def _rope_fwd_kernel(
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
    first, second = _columns(HALF, BLOCK_P, INTERLEAVED)
    mask_p = tl.arange(0, BLOCK_P) < HALF
    offs_r = tl.arange(0, BLOCK_R)
    tl.store(ptr + first, acc_1, mask=mask_p)
    tl.store(ptr + second, acc_2, mask=mask_p)
    tl.store(ptr + 2 * HALF + offs_r, acc_r, mask=offs_r < REST)


@triton.jit(do_not_specialize=["T"])
def _norm_rope_bwd_kernel(
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
