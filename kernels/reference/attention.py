"""Causal attention over packed segments that may share a prompt: the definition, in torch.

Shape letters: T packed tokens, S segments, N query heads, K key/value heads, D head dim, L tokens of one segment, C of
its context: the prompt and itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the segments of a pack begin, and which of them share a prompt; made by ``Segments.of``, once a pack.

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
    bounds: tuple[int, ...]
    """``cu_seqlens`` on the host, so that no layer waits for the GPU."""
    prompts: tuple[int, ...]
    """``prefix`` on the host."""
    max_length: int
    """Of the longest segment."""
    max_context: int
    """Of the longest segment with its prompt."""
    tables: dict[tuple, Any] = field(default_factory=dict, repr=False)
    """What kernels work out once for all layers, under keys of their own."""

    @classmethod
    def of(
        cls, lengths: Sequence[int], prompts: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> Segments:
        """From the length of every segment and the index of the segment that holds its prompt: its own index where it
        has none, as all have when ``prompts`` is left out.
        """
        own = range(len(lengths))
        owners = tuple(own) if prompts is None else tuple(prompts)
        bounds = (0, *itertools.accumulate(lengths))
        readers = list(bounds[1:])
        for index, prompt in enumerate(owners):
            if prompt == index:
                continue
            assert prompt < index and owners[prompt] == prompt, "a completion stands behind its prompt, which has none"
            assert all(owners[other] == prompt for other in range(prompt, index)), "completions follow their prompt"
            readers[prompt] = bounds[index + 1]
        contexts = [lengths[index] + (lengths[owners[index]] if owners[index] != index else 0) for index in own]
        cu_seqlens, prefix, ends = (
            torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (bounds, owners, readers)
        )
        return cls(cu_seqlens, prefix, ends, bounds, owners, max(lengths, default=0), max(contexts, default=0))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention [T, N, D] inside every segment and over its prompt, one segment after the other.

    ``q`` [T, N, D]; ``k`` and ``v`` [T, K, D], N a multiple of K; scores are q·k·``scale``. ``window`` W lets a token
    see itself and the W − 1 positions before it; ``softcap`` bends scores to ``softcap·tanh(score / softcap)``.
    """
    assert q.shape[0] == segments.bounds[-1], "segments cover other tokens than q"
    parts = [torch.empty_like(q[:0])]
    for index, (start, stop) in enumerate(itertools.pairwise(segments.bounds)):
        if start == stop:
            continue
        keys, values = k[start:stop], v[start:stop]
        prompt = segments.prompts[index]
        if prompt != index:
            first, last = segments.bounds[prompt : prompt + 2]
            keys, values = torch.cat([k[first:last], keys]), torch.cat([v[first:last], values])
        # [1, heads, tokens, D], as torch wants it
        query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q[start:stop], keys, values))
        if softcap is None:
            out = _sdpa(query, key, value, scale, window)
        else:
            out = _explicit(query, key, value, scale, window, softcap)
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """torch's attention; ``q`` [1, N, L, D], ``k`` and ``v`` [1, K, C, D]."""
    length, context = q.shape[2], k.shape[2]
    plain = length == context and (window is None or window >= context)
    mask = None if plain else _allowed(length, context, window, q.device)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=gqa)


def _explicit(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float) -> Tensor:
    """The scores [1, N, L, C] written out; softmax in float32 or wider."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(2, 3)) * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = softcap * torch.tanh(scores / softcap)
    hidden = ~_allowed(q.shape[2], k.shape[2], window, q.device)
    return scores.masked_fill(hidden, -math.inf).softmax(-1).to(v.dtype) @ v


def _allowed(length: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """bool [L, C]: whether the segment's row i, at position C − L + i, sees column j."""
    positions = torch.arange(context - length, context, device=device)
    distance = positions.unsqueeze(1) - torch.arange(context, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
