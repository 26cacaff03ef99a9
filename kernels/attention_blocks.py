"""What each program of the attention kernels works on: blocks of segments, worked out on the host once a pack.

All numbers are int32; heavy blocks come first, so that the last programs to start are short.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.kernels.reference.attention import Segments


class KeyBlocks(NamedTuple):
    """Blocks of keys, and the queries that see them."""

    blocks: Tensor
    """[blocks, 5]: first token, tokens, position of the first, first visit, visit after the last."""
    visits: Tensor
    """[visits, 3]: first query token, the one after the last, position of the first. Without a window the tokens behind
    a segment's end are its readers, who see all of it, and go on counting its positions."""
    equal_programs: float
    """The queries of all blocks by those of the heaviest: how many processors can share the work of one head."""


def query_blocks(segments: Segments, size: int) -> Tensor:
    """Blocks of up to ``size`` queries of one segment, [blocks, 5]: first token, tokens, position of the first, token
    at position 0, tokens of the prompt (0 without one).

    A segment's keys are its prompt and itself, one row of positions: position j of the prompt is token origin + j, one
    of the segment itself is token first - position + j.
    """
    key = ("queries", size)
    if key not in segments.tables:
        found = []
        for index, (start, stop) in enumerate(itertools.pairwise(segments.bounds)):
            origin, prompt = _context(segments, index)
            for first in range(start, stop, size):
                found.append((first, min(size, stop - first), prompt + first - start, origin, prompt))
        found.sort(key=lambda block: -block[1] - block[2])
        segments.tables[key] = _table(found, 5, segments)
    return segments.tables[key]


def key_blocks(segments: Segments, size: int, window: int | None) -> KeyBlocks:
    """Blocks of up to ``size`` keys of one segment."""
    key = ("keys", size, window)
    if key not in segments.tables:
        segments.tables[key] = _key_blocks(segments, size, window)
    return segments.tables[key]


def _key_blocks(segments: Segments, size: int, window: int | None) -> KeyBlocks:
    completions: dict[int, list[int]] = {}
    for index, prompt in enumerate(segments.prompts):
        if prompt != index:
            completions.setdefault(prompt, []).append(index)
    found: list[tuple[int, int, int, int, int]] = []
    visits: list[tuple[int, int, int]] = []
    for index, (start, stop) in enumerate(itertools.pairwise(segments.bounds)):
        before = _context(segments, index)[1]
        readers = completions.get(index, [])
        end = segments.bounds[readers[-1] + 1] if readers else stop
        for first in range(start, stop, size):
            tokens = min(size, stop - first)
            position = before + first - start
            if window is None:
                seen_by = [(first, end, position)]
            else:
                seen_by = [(first, min(stop, first + tokens - 1 + window), position)]
                # a reader's tokens near enough to the block's last key
                reach = position + tokens - 1 + window - (stop - start)
                for reader in readers:
                    low, high = segments.bounds[reader : reader + 2]
                    if min(high, low + reach) > low:
                        seen_by.append((low, min(high, low + reach), stop - start))
            found.append((first, tokens, position, len(visits), len(visits) + len(seen_by)))
            visits += seen_by
    costs = {block: sum(high - low for low, high, _ in visits[block[3] : block[4]]) for block in found}
    found.sort(key=lambda block: -costs[block])
    equal = sum(costs.values()) / max(costs.values(), default=1)
    return KeyBlocks(_table(found, 5, segments), _table(visits, 3, segments), equal)


def _context(segments: Segments, index: int) -> tuple[int, int]:
    """The first token that a segment sees, and the tokens of its prompt."""
    prompt = segments.prompts[index]
    first, stop = segments.bounds[prompt : prompt + 2]
    return first, 0 if prompt == index else stop - first


def _table(rows: Sequence[tuple[int, ...]], columns: int, segments: Segments) -> Tensor:
    table, device = torch.tensor(rows, dtype=torch.int32).view(-1, columns), segments.cu_seqlens.device
    if device.type == "cuda":
        table = table.pin_memory()  # from other memory the host would wait for all that the GPU has still to do
    return table.to(device, non_blocking=True)
