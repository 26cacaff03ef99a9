"""What every launcher asks: whether kernels run here, and how large a GPU they run on."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor


class Gpu(NamedTuple):
    """What a launcher needs to know about the device."""

    processors: int
    capability: tuple[int, int]
    """(9, 0) for Hopper."""
    interpreted: bool
    """Triton's interpreter on the host: about a millisecond a program, and no bfloat16 arithmetic."""


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The GPU behind ``device``; for the host, what the interpreter stands for: a small one of capability 8.0."""
    if device.type == "cpu":
        return Gpu(4, (8, 0), True)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, (properties.major, properties.minor), False)


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of ``device``: an NVIDIA GPU from compute capability 7.5 on, or the
    host under ``TRITON_INTERPRET=1``.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and torch.version.hip is None and gpu(device).capability >= (7, 5)


def rows(x: Tensor) -> Tensor:
    """``x`` […, H] as [M, H] with a last stride of 1; copied only where it cannot be viewed so."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def power_of_2(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()
