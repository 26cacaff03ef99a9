"""Float8 weights under scales: the definition, in torch.

Shape letters: M rows of x, N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.kernels.reference.precision import accumulation_dtype

FP8_BLOCK = 128
"""Side of the square of float8 weights under one scale, where scales go by block."""


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x (weight · scale)ᵀ + bias`` [M, N] in x's type, rounded once; ``x`` [M, K], the rest as below."""
    dtype = accumulation_dtype(x.dtype)
    y = x.to(dtype) @ dequantize_fp8(weight, scale, dtype).T
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def dequantize_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` float8_e4m3fn [N, K] times ``scale`` float32, one, one a row [N] or [N, 1], or one for each square of
    ``FP8_BLOCK``² weights. Every element is rounded once: e4m3 is exact in any wider type, and a scale that is not a
    bare number keeps its float32 in the product.
    """
    outputs, inputs = weight.shape
    product = weight.to(dtype)
    if scale.numel() == 1 or tuple(scale.shape) in {(outputs,), (outputs, 1)}:
        return product.mul_(scale.view(-1, 1))
    rows = scale.repeat_interleave(FP8_BLOCK, dim=0)[:outputs]
    whole = inputs // FP8_BLOCK
    cut = whole * FP8_BLOCK
    if whole:
        product[:, :cut].unflatten(1, (whole, FP8_BLOCK)).mul_(rows[:, :whole, None])
    if cut < inputs:
        product[:, cut:].mul_(rows[:, whole:])
    return product
