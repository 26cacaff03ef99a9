"""RMS norm, alone or of the sum with the residual stream; Gemma's weights less one too.

Shape letters: M rows (T packed tokens), H hidden.

Bound by memory: forward reads x and writes the result once. Backward keeps x alone: a row is in registers there anyway,
so its root mean square is computed again instead of read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.launch import gpu, power_of_2, rows

WIDEST = 16384
"""H at most: a program holds whole rows."""


class _Tiles(NamedTuple):
    elements: int
    """Of a tile, at least: shorter rows share a program."""
    per_thread: int
    """Elements of each tensor that a thread holds; 8 are one access of 16 bytes."""
    most_warps: int


FORWARD = _Tiles(4096, 32, 32)
BACKWARD = _Tiles(4096, 32, 16)
PROGRAMS = 4
"""On a multiprocessor, where the weight's gradient is summed: each walks over its share of the rows."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """``x / √(mean(x²) + eps) · (weight + offset)`` […, H] in x's type, computed in float32 and rounded once.

    ``x`` in float16, bfloat16 or float32, ``weight`` [H] of any type; ``offset`` 1.0 for Gemma.
    """
    return _RmsNorm.apply(x, weight, eps, offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``, the norm of the sum as rounded to their type.

    The gradients of ``x`` and ``residual`` are one tensor: whoever receives it must not write to it.
    """
    return _AddRmsNorm.apply(x, residual, weight, eps, offset)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.constants = eps, offset
        return rms_norm_forward(x, None, weight, eps, offset)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        eps, offset = ctx.constants
        grad_x, grad_weight = rms_norm_backward((grad, None), x, weight, eps, offset, ctx.needs_input_grad[1])
        return grad_x, grad_weight, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        normed, total = rms_norm_forward(x, residual, weight, eps, offset)
        ctx.save_for_backward(total, weight)
        ctx.constants = eps, offset
        ctx.set_materialize_grads(False)
        return normed, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nobody used the norm
            return grad_total, grad_total, None, None, None
        total, weight = ctx.saved_tensors
        eps, offset = ctx.constants
        grads, wanted = (grad, grad_total), ctx.needs_input_grad[2]
        grad_x, grad_weight = rms_norm_backward(grads, total, weight, eps, offset, wanted)
        return grad_x, grad_x, grad_weight, None, None


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """The norm and what it is the norm of, ``x`` itself where there is no ``residual``; no gradient."""
    flat = rows(x)
    other = flat if residual is None else rows(residual)
    assert other.shape == flat.shape and other.dtype == flat.dtype, "x and residual differ in shape or type"
    block_m, block_h, warps = _tile(flat, weight, FORWARD)
    normed = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    total = flat if residual is None else torch.empty_like(normed)
    _rms_norm_fwd_kernel[(triton.cdiv(flat.shape[0], block_m),)](
        flat,
        other,
        weight.contiguous(),
        normed,
        total,
        flat.shape[0],
        flat.stride(0),
        other.stride(0),
        eps,
        offset,
        H=flat.shape[1],
        ADD=residual is not None,
        BLOCK_M=block_m,
        BLOCK_H=block_h,
        num_warps=warps,
    )
    return normed.view(x.shape), x if residual is None else total.view(x.shape)


def rms_norm_backward(
    grads: tuple[Tensor, Tensor | None], x: Tensor, weight: Tensor, eps: float, offset: float, weight_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, the sum where there was a residual, and of ``weight`` where asked for.

    ``grads``: of the norm, and of the sum where something else used it.
    """
    flat, grad = rows(x), rows(grads[0])
    grad_total = None if grads[1] is None else rows(grads[1])
    block_m, block_h, warps = _tile(flat, weight, BACKWARD)
    programs = triton.cdiv(flat.shape[0], block_m)
    if weight_gradient:
        programs = min(programs, PROGRAMS * gpu(x.device).processors)
    grad_x = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    # Each program's own sum, added up in a fixed order: the same bits every time.
    sums = torch.empty((programs, flat.shape[1]) if weight_gradient else (0,), dtype=torch.float32, device=x.device)
    _rms_norm_bwd_kernel[(programs,)](
        grad,
        grad if grad_total is None else grad_total,
        flat,
        weight.contiguous(),
        grad_x,
        sums,
        flat.shape[0],
        grad.stride(0),
        0 if grad_total is None else grad_total.stride(0),
        flat.stride(0),
        eps,
        offset,
        H=flat.shape[1],
        ADD=grad_total is not None,
        WEIGHT_GRADIENT=weight_gradient,
        BLOCK_M=block_m,
        BLOCK_H=block_h,
        num_warps=warps,
    )
    return grad_x.view(x.shape), sums.sum(0).to(weight.dtype) if weight_gradient else None


def _tile(flat: Tensor, weight: Tensor, tiles: _Tiles) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps."""
    assert flat.dtype in {torch.float16, torch.bfloat16, torch.float32}, f"no norm of {flat.dtype}"
    assert weight.shape == flat.shape[1:] and flat.shape[1] <= WIDEST, f"x {flat.shape}, weight {weight.shape}"
    block_h = power_of_2(flat.shape[1])
    block_m = max(1, tiles.elements // block_h)
    warps = block_m * block_h // (32 * tiles.per_thread)
    return block_m, block_h, max(1, min(warps, tiles.most_warps))


@triton.jit(do_not_specialize=["M"])
def _rms_norm_fwd_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    total_ptr: tl.tensor,
    M: tl.tensor,
    stride_xm: tl.tensor,
    stride_rm: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    H: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """BLOCK_M whole rows; what is written is contiguous."""
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask = (offs_m < M)[:, None] & (offs_h < H)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_h[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs_h, mask=offs_h < H, other=0.0).to(tl.float32) + offset
    out = offs_m[:, None] * H + offs_h[None, :]
    if ADD:
        residual = tl.load(residual_ptr + offs_m[:, None] * stride_rm + offs_h[None, :], mask=mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / H + eps)
    normed = x * scale[:, None] * weight[None, :]
    tl.store(normed_ptr + out, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _rms_norm_bwd_kernel(
    grad_ptr: tl.tensor,
    grad_total_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    M: tl.tensor,
    stride_gm: tl.tensor,
    stride_tm: tl.tensor,
    stride_xm: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    H: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """With n = x s, s = (mean(x²) + eps)^-½ and g = grad · (weight + offset): dx = s (g − n mean(g n))."""
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    weight = tl.load(weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32) + offset
    acc = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (offs_m < M)[:, None] & mask_h[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_h[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offs_m[:, None] * stride_gm + offs_h[None, :], mask=mask, other=0.0).to(tl.float32)
        if ADD:  # asked for before the sums, behind which the compiler would leave it
            others = tl.load(grad_total_ptr + offs_m[:, None] * stride_tm + offs_h[None, :], mask=mask, other=0.0)
        scale = tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
        normed = x * scale
        if WEIGHT_GRADIENT:
            acc += tl.sum(grad * normed, 0)
        grad *= weight[None, :]
        grad_x = scale * (grad - normed * (tl.sum(grad * normed, 1) / H)[:, None])
        if ADD:
            grad_x += others.to(tl.float32)
        out = offs_m[:, None] * H + offs_h[None, :]
        tl.store(grad_x_ptr + out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if WEIGHT_GRADIENT:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * H + offs_h, acc, mask=mask_h)
