"""Rotary position embedding, alone and after a norm of each head: the definition, in torch.

Shape letters: T packed tokens, N query heads, K key heads, D head dim, R rotated dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.kernels.reference.norms import rms_norm
from posttrain.kernels.reference.precision import accumulation_dtype


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """q [T, N, D] and k [T, K, D], their first R dims rotated in pairs (Su et al. 2021, section 3.4.2), rounded once.

    ``cos`` and ``sin`` [T, R] hold a pair's angle at both of its columns: i and i + R/2 (Llama: two equal halves), or,
    ``interleaved``, 2i and 2i + 1 (GPT-J, Cohere: every angle twice in a row).
    """
    return _rotated(q, cos, sin, interleaved), _rotated(k, cos, sin, interleaved)


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
    """``rope`` of the RMS norm of each head (Qwen3, Gemma 3), rounded once at the end; weights [D]."""
    normed = [
        rms_norm(x.to(accumulation_dtype(x.dtype)), weight, eps, offset=offset)
        for x, weight in ((q, q_weight), (k, k_weight))
    ]
    rotated = rope(normed[0], normed[1], cos, sin, interleaved=interleaved)
    return rotated[0].to(q.dtype), rotated[1].to(k.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    turned, rest = wide.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    if interleaved:
        quarter = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        quarter = torch.cat((-second, first), dim=-1)
    cos, sin = cos.to(wide.dtype).unsqueeze(1), sin.to(wide.dtype).unsqueeze(1)
    return torch.cat((turned * cos + quarter * sin, rest), dim=-1).to(x.dtype)
