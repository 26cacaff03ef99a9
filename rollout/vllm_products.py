"""What our products of vLLM's quantized layers have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def locks_beside(weight: Tensor) -> Tensor:
    """Zeros for the kernels that cut their sums: a layer's own, since two layers may run on two streams at once."""
    if not weight.is_cuda:
        return torch.zeros(0, dtype=torch.int32)
    from posttrain.kernels.split_k import LOCKS

    return torch.zeros(LOCKS, dtype=torch.int32, device=weight.device)


def warm_up(module: Any, inputs: int, rows: list[int], like: Tensor) -> None:
    """Compile what a prompt or a batch of any size may need: not in the midst of sampling, nor while capturing."""
    for number in rows:
        module.quant_method.apply(module, like.new_zeros(number, inputs), getattr(module, "bias", None))
