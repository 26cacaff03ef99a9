"""Attention over packed segments behind transformers' ``AttentionInterface``: which implementation runs when.

Shape letters: T packed tokens, L of one segment, C of its context (the prompt and itself), N query heads, K key/value
heads, D head dim.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from posttrain.kernels import reference
from posttrain.kernels.reference.attention import Segments
from posttrain.rl.errors import EngineError

log = logging.getLogger(__name__)

NAME = "posttrain_packed"
"""Name under which transformers finds it. It has no mask function, so that no [T, T] mask is ever built."""

_PLAIN_ARGUMENTS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}
    | {"output_router_logits", "num_items_in_batch", "is_causal", "position_embeddings", "logits_to_keep"}
    | {"layer_idx", "input_ids", "inputs_embeds"}
)
"""Keyword arguments some architectures hand through that do not change the attention of a training forward pass."""

Kernels = Literal["triton", "reference"]
"""``triton``: the kernels of this package; ``reference``: torch alone."""

TRITON_FOR_SHARED_PROMPTS = True
"""Our kernel for shared prompts even where flash attention runs, which has to copy a prompt's keys for each reader."""
TRITON_FOR_REPEATED_HEADS = True
"""Our kernel where torch's flash attention wants the keys of grouped-query heads repeated: torch before 2.13."""

_logged: set[str] = set()


@dataclass(frozen=True)
class Packing:
    """What every layer's attention has to know of a pack."""

    segments: Segments
    kernels: Kernels = "reference"
    """``triton``: the kernels of this package may be taken."""


def packed_attention(  # noqa: PLR0913 — transformers calls it with these
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packing: Packing | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment of a pack, and from a completion to its prompt.

    ``query`` [1, N, T, D], ``key`` and ``value`` [1, K, T, D] → [1, T, N, D]. ``sliding_window`` W lets a token see
    itself and the W − 1 before it; ``softcap`` bends the scores; ``s_aux`` [N] are attention sinks. Raises
    ``EngineError`` for anything an architecture asks for that is not one of these.
    """
    _refuse(module, attention_mask, packing, others)
    assert packing is not None and query.shape[0] == 1 and query.shape[2] == packing.segments.bounds[-1]
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D], views
    window = None if sliding_window is None or sliding_window >= packing.segments.max_context else sliding_window
    rule = _Rule(q.shape[-1] ** -0.5 if scaling is None else float(scaling), window, softcap, s_aux)
    name, attend = _choose(q, k, v, packing, rule)
    _log_once(f"{name} ({q.device.type}, {q.dtype}{', shared prompts' if _shares_prompts(packing.segments) else ''})")
    return attend(q, k, v, packing.segments, rule).unsqueeze(0), None


@dataclass(frozen=True)
class _Rule:
    """What turns queries and keys into weights."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


_Attend = Callable[[Tensor, Tensor, Tensor, Segments, _Rule], Tensor]
"""``q`` [T, N, D], ``k`` and ``v`` [T, K, D] → [T, N, D]."""


def _choose(q: Tensor, k: Tensor, v: Tensor, packing: Packing, rule: _Rule) -> tuple[str, _Attend]:
    """The implementation, and what to call it in the log."""
    if rule.sinks is not None:
        return "explicit scores with sinks, one segment at a time", _with_sinks
    triton = packing.kernels == "triton" and _triton_fits(q, v)
    shared = TRITON_FOR_SHARED_PROMPTS and _shares_prompts(packing.segments)
    repeated = TRITON_FOR_REPEATED_HEADS and q.shape[1] != k.shape[1] and not _varlen_groups_heads()
    ours = triton and (shared or repeated)
    if _varlen_fits(q, v) and rule.softcap is None and not ours:
        return "torch varlen_attn (flash attention)", _varlen
    if triton:
        return "Triton", _triton
    return "torch, one segment at a time", _reference


def _refuse(module: nn.Module, mask: Tensor | None, packing: Packing | None, others: dict[str, Any]) -> None:
    kind = type(module).__name__
    if packing is None or mask is not None:
        raise EngineError(f"{kind} does not hand packed sequences to its attention")
    if others.pop("dropout", 0.0):
        raise EngineError(f"{kind} asks for attention dropout: reinforcement learning needs it to be 0")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise EngineError(f"{kind} is not causal")
    unknown = [name for name, value in others.items() if value is not None and name not in _PLAIN_ARGUMENTS]
    if unknown:
        raise EngineError(f"{kind} asks its attention for {', '.join(unknown)}, which packed attention does not know")


def _reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: _Rule) -> Tensor:
    return reference.attention(q, k, v, segments, scale=rule.scale, window=rule.window, softcap=rule.softcap)


def _triton(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: _Rule) -> Tensor:
    from posttrain.kernels.attention import attention

    return attention(q, k, v, segments, scale=rule.scale, window=rule.window, softcap=rule.softcap)


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: _Rule) -> Tensor:
    """Scores [N, L, C] of a segment and its context written out, and a column of sinks; softmax in float32 or wider."""
    assert rule.sinks is not None and rule.softcap is None
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    parts = []
    for index, (start, stop) in enumerate(itertools.pairwise(segments.bounds)):
        context = _context(segments, index).to(q.device)
        positions = torch.arange(len(context) - (stop - start), len(context), device=q.device)
        distance = positions.unsqueeze(1) - torch.arange(len(context), device=q.device)
        seen = (distance >= 0) if rule.window is None else (distance >= 0) & (distance < rule.window)
        scores = torch.einsum("lnd,cnd->nlc", q[start:stop], k[context]) * rule.scale
        scores = scores if scores.dtype == torch.float64 else scores.float()
        column = rule.sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores.masked_fill(~seen, -math.inf), column], dim=-1).softmax(-1)[..., :-1]
        parts.append(torch.einsum("nlc,cnd->lnd", weights.to(v.dtype), v[context]))
    return torch.cat(parts)


def _shares_prompts(segments: Segments) -> bool:
    return segments.prompts != tuple(range(len(segments.prompts)))


def _context(segments: Segments, index: int) -> Tensor:
    """Which tokens [C] a segment sees: its prompt and itself; on the host."""
    spans = [segments.bounds[place : place + 2] for place in dict.fromkeys((segments.prompts[index], index))]
    return torch.cat([torch.arange(*span) for span in spans])


def _contexts(segments: Segments) -> tuple[Tensor, Tensor]:
    """The contexts of all segments end to end, and their cumulative lengths; worked out once a pack."""
    tables = segments.tables
    if ("contexts",) not in tables:
        contexts = [_context(segments, index) for index in range(len(segments.prompts))]
        bounds = [0, *itertools.accumulate(map(len, contexts))]
        device = segments.cu_seqlens.device
        tables["contexts",] = torch.cat(contexts).to(device)
        tables["contexts", "cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    return tables["contexts",], tables["contexts", "cu_seqlens"]


def _varlen_fits(q: Tensor, v: Tensor) -> bool:
    """Flash attention takes half precision from Ampere on, and heads up to 256 wide, key and value alike."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > 256 or q.shape[-1] % 8:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _triton_fits(q: Tensor, v: Tensor) -> bool:
    """Our kernel takes heads up to 256 wide, key and value alike, in single or half precision. Before Ampere Triton
    does without tensor cores, and torch's own attention is faster.
    """
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return False
    return q.shape[-1] == v.shape[-1] <= 256 and q.dtype in (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _varlen_groups_heads() -> bool:
    """Whether torch's varlen_attn takes fewer key heads than query heads; torch 2.11 wants them repeated."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: _Rule) -> Tensor:
    """Every segment with its whole context as keys, the prompt's copied for each completion: causal from the end."""
    from torch.nn.attention.varlen import varlen_attn

    # the window counts the keys to the left of the query itself
    window = (-1, 0) if rule.window is None else (rule.window - 1, 0)
    options: dict[str, Any] = {"scale": rule.scale, "window_size": window}
    cu_seqlens, longest = segments.cu_seqlens, segments.max_length
    cu_contexts, longest_context = cu_seqlens, longest
    if _shares_prompts(segments):
        index, cu_contexts = _contexts(segments)
        k, v, longest_context = k[index], v[index], segments.max_context
    if q.shape[1] != k.shape[1] and _varlen_groups_heads():
        options["enable_gqa"] = True
    elif q.shape[1] != k.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = varlen_attn(q, k, v, cu_seqlens, cu_contexts, longest, longest_context, **options)
    assert isinstance(out, Tensor)
    return out


def _log_once(choice: str) -> None:
    if choice not in _logged:
        _logged.add(choice)
        log.info("packed attention: %s", choice)


AttentionInterface.register(NAME, packed_attention)
