"""A matrix product whose sum is cut into parts, for the few rows of decoding: one tile of the result for each program
leaves most of a GPU idle.

Every program stores the sum of its part; the one that finishes last adds them up in a fixed order, so that results are
the same bits every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.launch import gpu

LOCKS = 1024
"""int32 zeros that one call needs at most. They are zeros again when it is done."""


class Cut(NamedTuple):
    """How a product is cut, and the memory for it."""

    parts: int
    sums: Tensor
    """float32 [tiles · parts · elements of a tile]; where nothing is cut, anything."""
    locks: Tensor
    """int32 [LOCKS], zeros."""


def cut(y: Tensor, tiles: int, tile_size: int, most: int, locks: Tensor | None) -> Cut:
    """Cut the sums of ``y`` into ``most`` parts at most, no more than leave each of ``tiles`` a lock."""
    parts = max(1, most)
    if parts == 1:
        return Cut(1, y, y if locks is None else locks)
    assert tiles <= LOCKS, "a tile has no lock"
    sums = torch.empty(tiles * parts * tile_size, dtype=torch.float32, device=y.device)
    return Cut(parts, sums, torch.zeros(LOCKS, dtype=torch.int32, device=y.device) if locks is None else locks)


def parts_to_fill(device: torch.device, tiles: int, programs: int) -> int:
    """Parts of each tile that make about ``programs`` programs for each multiprocessor."""
    return programs * gpu(device).processors // tiles


def even_parts(steps: int, most: int) -> int:
    """The parts among which ``steps`` are dealt, each as many as the largest of ``most``: none is left empty."""
    each = -(-steps // max(1, most))
    return -(-steps // each)


@triton.jit
def store_part(
    acc: tl.tensor, sums_ptr: tl.tensor, locks_ptr: tl.tensor, tile: tl.tensor, part: tl.tensor, parts: tl.tensor
) -> tl.tensor:
    """Store the sum ``acc`` [A, B] of one part of a tile; whether it was the last that was missing."""
    size: tl.constexpr = acc.shape[0] * acc.shape[1]
    at = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
    tl.store(sums_ptr + (tile.to(tl.int64) * parts + part) * size + at, acc)
    tl.debug_barrier()  # every thread has stored before one of them says so
    return tl.atomic_add(locks_ptr + tile, 1, sem="acq_rel", scope="gpu") == parts - 1


@triton.jit
def sum_of_parts(
    acc: tl.tensor, sums_ptr: tl.tensor, locks_ptr: tl.tensor, tile: tl.tensor, parts: tl.tensor
) -> tl.tensor:
    """All parts of a tile in their order, in ``acc``'s shape; gives the lock back."""
    size: tl.constexpr = acc.shape[0] * acc.shape[1]
    at = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
    tl.debug_barrier()
    total = tl.zeros_like(acc)
    sums_ptrs = sums_ptr + tile.to(tl.int64) * parts * size + at
    AT_ONCE: tl.constexpr = 8 if size <= 512 else 4096 // size if size < 4096 else 1  # as many as registers hold
    for first in range(0, parts, AT_ONCE):
        for part in tl.static_range(AT_ONCE):
            here = tl.zeros_like(at) + first + part < parts  # a tensor in the interpreter, too
            total += tl.load(sums_ptrs + (first + part) * size, mask=here, other=0.0, cache_modifier=".cg")
    tl.store(locks_ptr + tile, 0)
    return total
