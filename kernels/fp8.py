"""Float8 weights under scales, dequantized in one pass, and what that has in common with their product.

Shape letters: N outputs, K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.launch import gpu
from posttrain.kernels.reference.fp8 import FP8_BLOCK

TENSOR, ROW, SQUARE = 0, 1, 2
"""What shares a scale: everything, an output, a square of 128 × 128 weights."""
BLOCK_ROWS = 32
"""Of the weight as it lies in memory, by ``FP8_BLOCK`` columns: what one program dequantizes."""
WARPS = 4


def dequantize_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight · scale`` [N, K] in ``dtype``, multiplied in float32 and rounded once; row-major, or column-major where
    the weight is.

    ``weight`` float8_e4m3fn [N, K] of any strides; ``scale`` float32: one number, one a row [N] or [N, 1], or one for
    each square of 128 × 128 weights.
    """
    assert weight.dtype == torch.float8_e4m3fn and weight.ndim == 2, "weight float8_e4m3fn [N, K]"
    outputs, inputs = weight.shape
    kind = scale_kind(scale, outputs, inputs)
    strides = scale_strides(scale, kind)
    transposed = weight.stride(0) < weight.stride(1)
    out = torch.empty((inputs, outputs) if transposed else (outputs, inputs), dtype=dtype, device=weight.device)
    rows, columns = out.shape
    if out.numel():
        native = native_e4m3(weight.device)
        held, (stride_sr, stride_sc) = (weight.t(), strides[::-1]) if transposed else (weight, strides)
        _dequantize_fp8_kernel[(triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, FP8_BLOCK))](
            held if native else held.view(torch.uint8),
            scale,
            out,
            rows,
            columns,
            *held.stride(),
            stride_sr,
            stride_sc,
            SIDE=FP8_BLOCK if kind == SQUARE else 1,
            BY_COLUMN=kind == ROW and transposed,
            NATIVE=native,
            EVEN=rows % BLOCK_ROWS == 0 and columns % FP8_BLOCK == 0,
            BLOCK_R=BLOCK_ROWS,
            BLOCK_C=FP8_BLOCK,
            num_warps=WARPS,
        )
    return out.t() if transposed else out


def scale_kind(scale: Tensor, outputs: int, inputs: int) -> int:
    """How ``scale`` belongs to a weight [outputs, inputs]."""
    if scale.numel() == 1:
        return TENSOR
    if tuple(scale.shape) in {(outputs,), (outputs, 1)}:
        return ROW
    assert tuple(scale.shape) == (-(-outputs // FP8_BLOCK), -(-inputs // FP8_BLOCK)), f"scale {tuple(scale.shape)}"
    return SQUARE


def scale_strides(scale: Tensor, kind: int) -> tuple[int, int]:
    """Steps from one output, or square of outputs, and from one square of inputs to the next."""
    if kind == TENSOR:
        return 0, 0
    return scale.stride(0), scale.stride(1) if kind == SQUARE else 0


def native_e4m3(device: torch.device) -> bool:
    """Whether the compiler converts e4m3 there: from compute capability 8.9 on."""
    found = gpu(device)
    return not found.interpreted and found.capability >= (8, 9)


@triton.jit
def widened(bits: tl.tensor, NATIVE: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """e4m3 to a wider type, exactly. Without hardware for it: the bits of a float16, 2⁸ too small, subnormals too."""
    if NATIVE:
        # To bfloat16 by float32: straight from float16 is one conversion more, at an eighth of the rate.
        return bits.to(tl.float16).to(tl.float32).to(dtype)
    else:
        wide = bits.to(tl.uint16)
        magnitude = wide & 0x7F
        value = (((wide & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True) * 256.0
        return tl.where(magnitude == 0x7F, float("nan"), value.to(tl.float32)).to(dtype)


@triton.jit
def _dequantize_fp8_kernel(
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    R: tl.tensor,
    C: tl.tensor,
    stride_wr: tl.tensor,
    stride_wc: tl.tensor,
    stride_sr: tl.tensor,
    stride_sc: tl.tensor,
    SIDE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """A tile of ``out`` [R, C]; R and C are the weight's sides as it lies in memory."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_r, mask_c = offs_r < R, offs_c < C
    w_ptrs = w_ptr + offs_r.to(tl.int64)[:, None] * stride_wr + offs_c.to(tl.int64)[None, :] * stride_wc
    out_ptrs = out_ptr + offs_r.to(tl.int64)[:, None] * C + offs_c[None, :]
    if EVEN:
        w = widened(tl.load(w_ptrs), NATIVE, tl.float32)
    else:
        w = widened(tl.load(w_ptrs, mask=mask_r[:, None] & mask_c[None, :], other=0.0), NATIVE, tl.float32)
    if BY_COLUMN:
        w *= tl.load(scale_ptr + offs_c * stride_sc, mask=mask_c, other=0.0)[None, :]
    else:  # a tile of columns lies within one square
        square = (tl.program_id(1) * BLOCK_C // SIDE) * stride_sc
        w *= tl.load(scale_ptr + (offs_r // SIDE) * stride_sr + square, mask=mask_r, other=0.0)[:, None]
    if EVEN:
        tl.store(out_ptrs, w.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out_ptrs, w.to(out_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_c[None, :])
