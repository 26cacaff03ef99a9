"""What a case of the benchmark is, and at which sizes.

Shape letters: T packed tokens, V vocabulary, H hidden, M rows, O outputs, I inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Function = Callable[..., Any]
"""Inputs to a tensor or several."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of every case."""

    device: str
    dtype: torch.dtype
    tokens: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    scored: tuple[tuple[int, int, int, bool], ...]
    """T, V, H of logprobs, and whether plain torch's [T, V] fits."""
    layers: tuple[tuple[str, int, int], ...]
    """Name, O and I of the linear layers of a decoding step."""
    rows: tuple[int, ...]
    lengths: tuple[int, int, int, int]
    """Sequences and their length; prompts are so long, and each has as many completions as it fits into the rest."""
    tail: int
    """Rows that are compared where rows do not know each other."""
    rank: int = 16


SIZES = {
    "full": Sizes(
        "cuda",
        torch.bfloat16,
        tokens=16384,
        hidden=2560,
        inner=9728,
        heads=32,
        kv_heads=8,
        head_dim=128,
        scored=((8192, 151936, 4096, True), (8 * 20480, 128256, 4096, False)),
        layers=(("qkv", 6144, 2560), ("o", 2560, 4096), ("gate_up", 19456, 2560), ("down", 2560, 9728)),
        rows=(1, 4, 16, 64),
        lengths=(16, 1280, 1024, 256),
        tail=1024,
    ),
    "tiny": Sizes(
        "cpu",
        torch.float32,
        tokens=24,
        hidden=64,
        inner=96,
        heads=4,
        kv_heads=2,
        head_dim=16,
        scored=((24, 301, 32, True), (40, 301, 32, False)),
        layers=(("qkv", 128, 64),),
        rows=(1, 5),
        lengths=(4, 12, 8, 4),
        tail=8,
        rank=16,
    ),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one shape."""

    op: str
    shape: str
    inputs: Callable[[], Sequence[Tensor]]
    """Those that require gradients get them."""
    ours: Callable[[], Function]
    plain: Function
    work: tuple[float, float]
    """Bytes that must be read and written, or operations, of the forward and the backward pass."""
    others: Mapping[str, Callable[[], Function]] = field(default_factory=dict)
    unsloth: Callable[[], Function] | None = None
    bound: Literal["bytes", "products"] = "bytes"
    outputs: int = 1
    """How many of what is returned are compared."""
    tail: int | None = None
    """Rows do not know each other: only so many, the last ones, are compared."""
    rotated: tuple[int, ...] = ()
    """Inputs of which many copies are used in turn."""
    left_out: tuple[str, ...] = ()
    """``torch`` or ``compile``, where they cannot do it at this size."""
    ungated: tuple[str, ...] = ()
    """Not the op itself, but what it is measured by."""
    wanted: str = ""


def imported(path: str) -> Any:
    """``package.module:name``; raises ``ImportError`` where it is not installed."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def drawn(sizes: Sizes, *shape: int, gradient: bool = False, scale: float = 1.0) -> Tensor:
    """Normal numbers in the sizes' type."""
    numbers = torch.randn(*shape, device=sizes.device) * scale
    return numbers.to(sizes.dtype).requires_grad_(gradient)
