"""Time of one linear layer in the shapes of Qwen3-4B, its weight out of every cache, as between two decoding steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import TypeVar

import torch

SHAPES = {
    "q": (4096, 2560),
    "kv": (1024, 2560),
    "qkv": (6144, 2560),
    "o": (2560, 4096),
    "gate_up": (19456, 2560),
    "down": (2560, 9728),
}
"""Outputs and inputs; ``qkv`` and ``gate_up`` as vLLM fuses them."""
ROTATED = 256 * 2**20
"""Bytes of weights between two uses of the same one."""
REPEATS = 9
T = TypeVar("T")


def copies_of(number_of_bytes: int) -> int:
    """How many weights of that size L2 cannot hold."""
    return -(-ROTATED // number_of_bytes)


def time_of(call: Callable[[T], object], arguments: Sequence[T], repeats: int = REPEATS) -> float:
    """Median microseconds of one call, over all arguments in turn, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(arguments[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for argument in arguments:
            call(argument)
    graph.replay()
    milliseconds = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        milliseconds.append(start.elapsed_time(end) / len(arguments))
    return median(milliseconds) * 1e3


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of a large copy: the ceiling of whatever only moves memory."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_of(target.copy_, [source])
