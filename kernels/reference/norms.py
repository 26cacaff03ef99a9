"""Root mean square norms: the definition, in torch.

Shape letters: H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.kernels.reference.precision import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """``x / √(mean(x²) + eps) · (weight + offset)`` […, H] in x's type, rounded once (Zhang and Sennrich 2019,
    section 4).

    ``weight`` [H]; ``offset`` 1.0 where the weight is stored less one, as Gemma's is.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.to(wide.dtype) + offset)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``: the norm is of the sum as rounded to x's type."""
    total = x + residual
    return rms_norm(total, weight, eps, offset=offset), total
