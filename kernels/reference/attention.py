"""Causal attention over packed segments that may share a prompt: the definition, in torch.

Shape letters: T packed tokens, S segments, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Segments(NamedTuple):
    """Where the segments of a pack begin, and which of them share a prompt.

    A segment is a whole sequence, a prompt, or a completion; a prompt's completions follow it directly. Every token
    sees its own segment up to itself and, in a completion, the whole prompt before that; its position is the prompt's
    length plus its place in the completion.
    """

    cu_seqlens: Tensor
    """int32 [S + 1], cumulative lengths, first 0, last T."""
    prefix: Tensor
    """int32 [S]: the index of the segment that holds a completion's prompt, the segment's own index where it has
    none."""
    readers: Tensor
    """int32 [S]: the token after the last one that sees this segment: the end of the last completion of a prompt, the
    segment's own end where nobody else sees it."""
    max_length: int
    """Of the longest segment."""
    max_context: int
    """Of the longest segment with its prompt."""
