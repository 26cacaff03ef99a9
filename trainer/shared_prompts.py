"""An ordinary pack, each sequence with its own prompt, laid out so that a common prompt is there once.

Shape letters: B sequences, T tokens of the ordinary pack, U tokens laid out, S scored tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.rl.packing import families

LEAST_SAVING = 0.03
"""Share of a pack's tokens from which on prompts are shared: below it, attention over a plain pack may be faster. The
token budget (``rl.packing``) counts them as shared all the same: it is exceeded by this much at most.
"""


class Layout(NamedTuple):
    """Segments end to end, a prompt's completions behind it, and where to look in their hidden states; on the host."""

    tokens: Tensor
    """int64 [U]: which token of the ordinary pack stands there."""
    lengths: list[int]
    """Tokens of each segment."""
    prompts: list[int]
    """The segment that holds each segment's prompt; its own index where it has none."""
    rows: Tensor
    """int64 [S]: whose hidden state predicts each scored token; for the first of a completion, the prompt's last."""


def lay_out(input_ids: Tensor, cu_seqlens: Tensor, positions: Tensor, *, share: bool) -> Layout:
    """Lay out tokens [T] in sequences [B + 1] of which those at ``positions`` [S], ascending, are scored.

    What stands before the first scored token of a sequence is its prompt; equal ones become one where they ``share``
    and that saves ``LEAST_SAVING`` of the tokens. A sequence without a scored token is left out.
    """
    scored = positions.cpu()
    tokens, rows = [scored[:0]], torch.empty_like(scored)
    lengths: list[int] = []
    prompts: list[int] = []
    place = 0
    for members in _together(input_ids, _sequences(cu_seqlens, scored), share):
        first = members[0]
        completions = [member.stop - member.split for member in members]
        lengths += [first.split - first.start, *completions] if len(members) > 1 else [first.stop - first.start]
        prompts += [len(prompts)] * (len(lengths) - len(prompts))
        tokens.append(torch.arange(first.start, first.split))
        place += first.split - first.start
        last_of_prompt = place - 1
        for member in members:
            tokens.append(torch.arange(member.split, member.stop))
            rows[member.scored] = scored[member.scored] - 1 - member.split + place
            rows[member.scored.start] = last_of_prompt
            place += member.stop - member.split
    return Layout(torch.cat(tokens), lengths, prompts, rows)


class _Sequence(NamedTuple):
    """A sequence with scored tokens, the first of them at ``split``."""

    start: int
    split: int
    stop: int
    scored: slice
    """Which of the scored tokens are its own."""


def _sequences(cu_seqlens: Tensor, scored: Tensor) -> list[_Sequence]:
    cuts = torch.searchsorted(scored, cu_seqlens.to(scored)).tolist()
    return [
        _Sequence(start, int(scored[first]), stop, slice(first, last))
        for (start, stop), (first, last) in zip(pairwise(cu_seqlens.tolist()), pairwise(cuts), strict=True)
        if first < last
    ]


def _together(input_ids: Tensor, sequences: list[_Sequence], share: bool) -> list[list[_Sequence]]:
    """The sequences of each prompt, or each by itself."""
    if share:
        ids = input_ids.tolist()
        lengths = [sequence.stop - sequence.start for sequence in sequences]
        found = families([ids[sequence.start : sequence.split] for sequence in sequences], lengths, share=True)
        if sum(family.tokens for family in found) <= (1 - LEAST_SAVING) * sum(lengths):
            return [[sequences[index] for index in family.added] for family in found]
    return [[sequence] for sequence in sequences]
