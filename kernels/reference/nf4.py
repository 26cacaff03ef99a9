"""NF4 weights (2305.14314) as bitsandbytes lays them out: the definition, in torch.

Shape letters: M rows of x, O outputs, I inputs; N blocks of weights under one absmax.

The weights of the matrix row after row, two codes a byte, the first in the high half; every ``block_size`` of them
share a float32 absmax. A block may reach from one row into the next.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.kernels.reference.precision import accumulation_dtype

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, scaled to ±1 (2305.14314, appendix E); each is a float32."""


class NestedAbsmax(NamedTuple):
    """How absmax itself is quantized (double quantization): ``code[absmax] · scale + offset``."""

    code: Tensor
    """float32 [256]."""
    scale: Tensor
    """float32 [⌈N/block_size⌉]."""
    offset: Tensor
    """float32, one number."""
    block_size: int = 256


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    block_size: int = 64,
    nested: NestedAbsmax | None = None,
) -> Tensor:
    """[O, I] = ``shape``. ``packed`` uint8 of ⌈OI/2⌉ elements; ``absmax`` [N] float32, or uint8 with ``nested``.

    ``code · absmax`` in float32, rounded once to ``dtype``: the numbers of bitsandbytes' CUDA kernel.
    """
    codes = torch.tensor(NF4_CODE, device=packed.device)
    bits = packed.reshape(-1)
    pairs = torch.stack([bits >> 4, bits & 15], dim=1).flatten()[: math.prod(shape)]
    if nested is not None:
        absmax = nested.code[absmax.int()] * nested.scale.repeat_interleave(nested.block_size)[: absmax.numel()]
        absmax = absmax + nested.offset
    scale = absmax.repeat_interleave(block_size)[: pairs.numel()]
    return (codes[pairs.int()] * scale).to(dtype).view(shape)


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    *,
    block_size: int = 64,
    bias: Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + bias`` [M, O] in x's type, ``x`` [M, I]: W as ``dequantize_nf4`` gives it in x's type, one rounding of
    the sum.
    """
    dtype = accumulation_dtype(x.dtype)
    weight = dequantize_nf4(packed, absmax, shape, x.dtype, block_size=block_size)
    y = x.to(dtype) @ weight.to(dtype).T
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)
