"""Gated linear units: activation(gate) · up, with silu or tanh-gelu.

Shape letters: M rows (T packed tokens), I MLP.

Elementwise and bound by memory. Backward computes the activation again from gate: only gate and up are kept, and the
fused MLP block has backward write h and both gradients where their inputs were.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.launch import rows
from posttrain.kernels.reference.glu import Activation


class _Tiles(NamedTuple):
    columns: int
    """Of one row, for a program."""
    warps: int


FORWARD = _Tiles(2048, 8)
BACKWARD = _Tiles(2048, 8)


def glu(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``activation(gate) · up`` […, I] in gate's type, computed in float32 and rounded once; keeps gate and up."""
    return _Glu.apply(gate, up, activation)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu_forward(gate, up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = (torch.empty(gate.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        sources = rows(grad_h), rows(gate), rows(up)
        _launch_backward(sources, (rows(grad_gate), rows(grad_up)), ctx.activation, write_h=False)
        return grad_gate, grad_up, None


def glu_forward(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``glu`` for callers that do their own backward."""
    assert gate.shape == up.shape and gate.dtype == up.dtype, "gate and up differ in shape or type"
    assert gate.dtype in {torch.float16, torch.bfloat16, torch.float32}, f"no glu of {gate.dtype}"
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    flat_gate, flat_up, flat_h = rows(gate), rows(up), rows(h)
    _glu_fwd_kernel[_grid(flat_gate, FORWARD)](
        flat_gate,
        flat_up,
        flat_h,
        flat_gate.shape[1],
        flat_gate.stride(0),
        flat_up.stride(0),
        flat_h.stride(0),
        GELU=activation == "gelu_tanh",
        BLOCK_I=FORWARD.columns,
        num_warps=FORWARD.warps,
    )
    return h


def glu_backward_(grad_h: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """``(h, grad_gate, grad_up)``, each in the storage of the argument in its place, which it overwrites.

    All […, I], of any row strides but none that overlap, and of no use to anyone else any more: autograd must not have
    saved them, and ``grad_h`` must be the caller's own. Everything is computed in float32 and rounded once.
    """
    flat = tuple(x.view(-1, x.shape[-1]) for x in (grad_h, gate, up))
    assert all(x.stride(-1) == 1 for x in flat), "the last dim of every tensor is contiguous"
    _launch_backward((flat[0], flat[1], flat[2]), (flat[1], flat[2]), activation, write_h=True)
    return grad_h, gate, up


def _launch_backward(
    sources: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor, Tensor], activation: Activation, *, write_h: bool
) -> None:
    """``sources``: grad_h, gate and up; ``grads``: of gate and up, to be written; h goes over grad_h if anywhere."""
    grad_h, gate, up = sources
    assert gate.shape == up.shape == grad_h.shape, "grad_h, gate and up differ in shape"
    _glu_bwd_kernel[_grid(gate, BACKWARD)](
        grad_h,
        gate,
        up,
        grads[0],
        grads[1],
        gate.shape[1],
        grad_h.stride(0),
        gate.stride(0),
        up.stride(0),
        grads[0].stride(0),
        grads[1].stride(0),
        GELU=activation == "gelu_tanh",
        WRITE_H=write_h,
        BLOCK_I=BACKWARD.columns,
        num_warps=BACKWARD.warps,
    )


def _grid(flat: Tensor, tiles: _Tiles) -> tuple[int]:
    return (flat.shape[0] * triton.cdiv(flat.shape[1], tiles.columns),)


@triton.jit
def _activated(gate: tl.tensor, GELU: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The activation and its derivative: gate σ(z) with z = gate, or √(8/π) (gate + .044715 gate³) for tanh-gelu.

    1 − σ is formed from the exponential, not by subtraction, and the exponential never overflows.
    """
    if GELU:
        square = gate * gate
        z = gate * (1.5957691216057308 + 0.07135481627260025 * square)
        gate_slope = gate * (1.5957691216057308 + 0.21406444881780076 * square)
    else:
        z = gate
        gate_slope = gate
    small = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    sigmoid = tl.where(z >= 0, larger, smaller)
    return gate * sigmoid, sigmoid + gate_slope * (larger * smaller)


@triton.jit
def _glu_fwd_kernel(
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    h_ptr: tl.tensor,
    width: tl.tensor,
    stride_gm: tl.tensor,
    stride_um: tl.tensor,
    stride_hm: tl.tensor,
    GELU: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """BLOCK_I columns of one row."""
    blocks = tl.cdiv(width, BLOCK_I)
    m = (tl.program_id(0) // blocks).to(tl.int64)
    offs_i = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < width
    gate = tl.load(gate_ptr + m * stride_gm + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + m * stride_um + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    activated, _ = _activated(gate, GELU)
    tl.store(h_ptr + m * stride_hm + offs_i, (activated * up).to(h_ptr.dtype.element_ty), mask=mask_i)


@triton.jit
def _glu_bwd_kernel(
    grad_h_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    grad_gate_ptr: tl.tensor,
    grad_up_ptr: tl.tensor,
    width: tl.tensor,
    stride_hm: tl.tensor,
    stride_gm: tl.tensor,
    stride_um: tl.tensor,
    stride_ggm: tl.tensor,
    stride_gum: tl.tensor,
    GELU: tl.constexpr,
    WRITE_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """BLOCK_I columns of one row, all read before any is written: outputs may lie where the inputs do."""
    blocks = tl.cdiv(width, BLOCK_I)
    m = (tl.program_id(0) // blocks).to(tl.int64)
    offs_i = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < width
    grad_h = tl.load(grad_h_ptr + m * stride_hm + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + m * stride_gm + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + m * stride_um + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    activated, slope = _activated(gate, GELU)
    grad_gate, grad_up = grad_h * up * slope, grad_h * activated
    tl.store(grad_gate_ptr + m * stride_ggm + offs_i, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask_i)
    tl.store(grad_up_ptr + m * stride_gum + offs_i, grad_up.to(grad_up_ptr.dtype.element_ty), mask=mask_i)
    if WRITE_H:
        h = (activated * up).to(grad_h_ptr.dtype.element_ty)
        tl.store(grad_h_ptr + m * stride_hm + offs_i, h, mask=mask_i)
