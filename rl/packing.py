"""Which sequences share a micro-batch, and how many tokens it costs where a prompt is computed once for all of them.

Shape letters: B sequences, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.rl.types import TrainBatch


@dataclass(slots=True, frozen=True)
class Family:
    """Sequences that begin with the same prompt."""

    prompt: int
    """Tokens of the prompt; 0 where nothing is shared."""
    added: dict[int, int]
    """Tokens that each sequence adds to it, by the sequence's index."""

    @property
    def tokens(self) -> int:
        """What the family costs in one micro-batch."""
        return self.prompt + sum(self.added.values())

    def cut(self, budget: int) -> list[Family]:
        """Parts of at most ``budget`` tokens, each of which pays for the prompt; a longer sequence is one by itself."""
        if self.tokens <= budget:
            return [self]
        members = list(self.added)
        bins = _first_fit([self.added[index] for index in members], budget - self.prompt)
        return [Family(self.prompt, {members[i]: self.added[members[i]] for i in places}) for places in bins]


def families(prompts: Sequence[Sequence[int]], lengths: Sequence[int], *, share: bool) -> list[Family]:
    """Sequences of ``lengths``, prompt included, by prompt; each in a family of its own where they do not ``share``."""
    if not share:
        return [Family(0, {index: length}) for index, length in enumerate(lengths)]
    found: dict[tuple[int, ...], dict[int, int]] = {}
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        found.setdefault(tuple(prompt), {})[index] = length - len(prompt)
    return [Family(len(prompt), added) for prompt, added in found.items()]


def fill(found: Iterable[Family], budget: int) -> list[list[int]]:
    """Micro-batches of at most ``budget`` tokens: the indices of their sequences, those of a family side by side.

    A family is cut only where it does not fit. A sequence longer than the budget has a micro-batch to itself.
    """
    pieces = [piece for family in found for piece in family.cut(budget)]
    bins = _first_fit([piece.tokens for piece in pieces], budget)
    return [[index for place in places for index in pieces[place].added] for places in bins]


def prompts(batch: TrainBatch) -> list[list[int]]:
    """What stands before the first loss token of each sequence; nothing where it has none."""
    ids, mask = batch.input_ids.tolist(), batch.loss_mask.tolist()
    found = []
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        first = next((place for place in range(start, stop) if mask[place]), start)
        found.append(ids[start:first])
    return found


def tokens(batch: TrainBatch, *, share: bool) -> int:
    """What a micro-batch costs: its tokens, with a common prompt counted once where prompts are shared."""
    if not share:
        return len(batch.input_ids)
    lengths = batch.cu_seqlens.diff().tolist()
    return sum(family.tokens for family in families(prompts(batch), lengths, share=True))


def _first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: indices by bin, ascending in each. A length above ``budget`` has its bin to itself."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        home = next((b for b, space in enumerate(room) if space >= lengths[index]), None)
        if home is None:
            home = len(bins)
            bins.append([])
            room.append(budget)
        bins[home].append(index)
        room[home] -= lengths[index]
    return [sorted(members) for members in bins]
