"""Packed micro-batches cut into their sequences and packed again: under a smaller budget, or dealt out to ranks.

Shape letters: B sequences, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from posttrain.rl.packing import Family, families, fill, prompts
from posttrain.rl.types import Scores, TrainBatch

_COLUMNS = (
    "input_ids",
    "position_ids",
    "loss_mask",
    "advantages",
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
)
"""Every ``[T]`` tensor of a batch."""
PARTS_OF_A_SHARE = (1, 2, 4, 8)
"""Families whose prompt is shared are dealt in pieces of at most this part of a rank's share, whichever is best."""


def repack(batches: Sequence[TrainBatch], budget: int, *, share_prompts: bool = False) -> list[TrainBatch]:
    """The sequences of one optimizer step in micro-batches that cost at most ``budget`` tokens (``rl.packing``); a
    longer sequence has one of its own. The gradient stays what it was, but for BNPO, whose loss depends on how a step
    is cut.
    """
    bins = _bins(_sequences(batches), budget, share_prompts)
    return [_pack(batches, members, len(bins)) for members in bins]


@dataclass(slots=True, frozen=True)
class Deal:
    """The sequences of one optimizer step, dealt out to ranks."""

    shares: list[list[TrainBatch]]
    """The micro-batches of each rank; none for a rank without a sequence."""
    _batches: Sequence[TrainBatch]
    _places: list[list[list[_Sequence]]]
    """Which sequences each micro-batch of each rank holds, in order."""

    def collect(self, scores: Sequence[Sequence[Scores]]) -> list[Scores]:
        """What the ranks scored, a ``Scores`` for each of their micro-batches, as if the dealt batches had been."""
        parts: dict[_Sequence, Scores] = {}
        for places, scored in zip(self._places, scores, strict=True):
            for sequences, score in zip(places, scored, strict=True):
                lengths = [len(sequence) for sequence in sequences]
                cut = zip(score.logprobs.split(lengths), score.entropy.split(lengths), strict=True)
                parts |= {sequence: Scores(*pair) for sequence, pair in zip(sequences, cut, strict=True)}
        collected: list[list[Scores]] = [[] for _ in self._batches]
        for sequence in _sequences(self._batches):
            collected[sequence.batch].append(parts[sequence])
        return [
            Scores(torch.cat([part.logprobs for part in own]), torch.cat([part.entropy for part in own]))
            for own in collected
        ]


def deal(batches: Sequence[TrainBatch], ranks: int, budget: int, *, share_prompts: bool = False) -> Deal:
    """Give each sequence, longest first, to the rank where the fewest tokens are then, and pack each rank's share.

    Where prompts are shared, the completions of one stay together unless the ranks are done sooner when some are cut
    and more than one computes the prompt. The same sequences are dealt the same way, whatever else the batches hold:
    what was scored is trained in the same micro-batches.
    """
    sequences = _sequences(batches)
    found = _families(sequences, share_prompts)
    total = sum(family.tokens for family in found)
    deals = [_longest_first(found, ranks, min(budget, total // (ranks * parts))) for parts in PARTS_OF_A_SHARE]
    _, shares = min(deals, key=lambda dealt: dealt[0])
    places = [_bins([sequences[i] for i in share], budget, share_prompts) for share in shares]
    count = sum(map(len, places))
    return Deal([[_pack(batches, members, count) for members in place] for place in places], batches, places)


def _longest_first(found: Sequence[Family], ranks: int, limit: int) -> tuple[int, list[list[int]]]:
    """Families in pieces of at most ``limit`` tokens, dealt out: the tokens of the fullest rank, and who has what."""
    pieces = [(number, piece) for number, family in enumerate(found) for piece in family.cut(limit)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    paid: set[tuple[int, int]] = set()  # who computes which family's prompt already
    for number, piece in sorted(pieces, key=lambda pair: pair[1].tokens, reverse=True):
        after = [tokens[r] + piece.tokens - ((r, number) in paid) * piece.prompt for r in range(ranks)]
        rank = min(range(ranks), key=after.__getitem__)
        shares[rank] += piece.added
        tokens[rank] = after[rank]
        paid.add((rank, number))
    return max(tokens), shares


@dataclass(slots=True, frozen=True)
class _Sequence:
    """Where one sequence lies: tokens ``start`` to ``end`` of a batch."""

    batch: int
    start: int
    end: int
    prompt: list[int] = field(compare=False)

    def __len__(self) -> int:
        return self.end - self.start


def _sequences(batches: Sequence[TrainBatch]) -> list[_Sequence]:
    """Every sequence, in order."""
    found = []
    for index, batch in enumerate(batches):
        spans = pairwise(batch.cu_seqlens.tolist())
        found += [_Sequence(index, *span, prompt) for span, prompt in zip(spans, prompts(batch), strict=True)]
    return found


def _families(sequences: Sequence[_Sequence], share: bool) -> list[Family]:
    return families([sequence.prompt for sequence in sequences], [*map(len, sequences)], share=share)


def _bins(sequences: Sequence[_Sequence], budget: int, share: bool) -> list[list[_Sequence]]:
    """The sequences of each micro-batch."""
    return [[sequences[i] for i in places] for places in fill(_families(sequences, share), budget)]


def _pack(batches: Sequence[TrainBatch], sequences: Sequence[_Sequence], num_micro_batches: int) -> TrainBatch:
    first = batches[sequences[0].batch]
    columns: dict[str, Tensor | None] = {}
    for name in _COLUMNS:
        parts = [getattr(batches[sequence.batch], name) for sequence in sequences]
        assert len({part is None for part in parts}) == 1, f"some batches of a step have {name} and some have not"
        cut = [part[s.start : s.end] for part, s in zip(parts, sequences, strict=True) if part is not None]
        columns[name] = torch.cat(cut) if cut else None
    lengths = torch.tensor([0, *map(len, sequences)], device=first.cu_seqlens.device)
    bounds = lengths.cumsum(0).to(first.cu_seqlens.dtype)
    return replace(first, cu_seqlens=bounds, num_micro_batches=num_micro_batches, **columns)  # type: ignore[arg-type]
