"""Attention over packed sequences, without attention between them, behind transformers' ``AttentionInterface``.

Shape letters: T packed tokens, L one sequence, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

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

_logged: set[str] = set()


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a pack begin, on the device and on the host (so that no layer waits for the GPU)."""

    cu_seqlens: Tensor
    """int32 [B + 1]."""
    bounds: tuple[int, ...]
    """The same numbers."""
    max_length: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, device: torch.device) -> Packing:
        """From cumulative lengths; empty sequences are left out."""
        bounds = tuple(sorted({int(bound) for bound in cu_seqlens.tolist()}))
        lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
        return cls(torch.tensor(bounds, dtype=torch.int32, device=device), bounds, max(lengths, default=0))


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
    """Causal attention inside each sequence of a pack.

    ``query`` [1, N, T, D], ``key`` and ``value`` [1, K, T, D] → [1, T, N, D]. ``sliding_window`` W lets a token see
    itself and the W − 1 before it; ``softcap`` bends the scores; ``s_aux`` [N] are attention sinks. Raises
    ``EngineError`` for anything an architecture asks for that is not one of these.
    """
    _refuse(module, attention_mask, packing, others)
    assert packing is not None and query.shape[0] == 1 and query.shape[2] == packing.bounds[-1]
    window = None if sliding_window is None or sliding_window >= packing.max_length else sliding_window
    rule = _Rule(query.shape[-1] ** -0.5 if scaling is None else float(scaling), window, softcap, s_aux)
    if softcap is not None or s_aux is not None:
        _log_once("explicit scores, one sequence at a time (softcap or sinks)")
        return _by_segment(_explicit, query, key, value, packing, rule), None
    if _varlen_fits(query, value):
        _log_once("torch varlen_attn (flash attention)")
        return _varlen(query, key, value, packing, rule), None
    _log_once(f"scaled_dot_product_attention, one sequence at a time ({query.device.type}, {query.dtype})")
    return _by_segment(_sdpa, query, key, value, packing, rule), None


@dataclass(frozen=True)
class _Rule:
    """What turns queries and keys into weights."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


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


def _by_segment(
    attend: Callable[[Tensor, Tensor, Tensor, _Rule], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    rule: _Rule,
) -> Tensor:
    parts = []
    for start, stop in itertools.pairwise(packing.bounds):
        parts.append(attend(query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], rule))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _sdpa(query: Tensor, key: Tensor, value: Tensor, rule: _Rule) -> Tensor:
    """One sequence, [1, N, L, D]."""
    length = query.shape[2]
    windowed = rule.window is not None and rule.window < length
    mask = _allowed(length, rule.window, query.device) if windowed else None
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=rule.scale, enable_gqa=gqa
    )


def _explicit(query: Tensor, key: Tensor, value: Tensor, rule: _Rule) -> Tensor:
    """One sequence with its scores [1, N, L, L] written out; softmax in float32 or wider."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)) * rule.scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~_allowed(query.shape[2], rule.window, query.device), -math.inf)
    if rule.sinks is None:
        return scores.softmax(-1).to(value.dtype) @ value
    column = rule.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1].to(value.dtype) @ value


def _allowed(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [L, L]: row i sees column j when 0 ≤ i − j < window."""
    distance = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _varlen_fits(query: Tensor, value: Tensor) -> bool:
    """Flash attention takes half precision from Ampere on, and heads up to 256 wide, key and value alike."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256 or query.shape[-1] % 8:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen(query: Tensor, key: Tensor, value: Tensor, packing: Packing, rule: _Rule) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    # the window counts the keys to the left of the query itself
    window = (-1, 0) if rule.window is None else (rule.window - 1, 0)
    options: dict[str, Any] = {"scale": rule.scale, "window_size": window}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11 wants as many key heads as query heads
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    cu, longest = packing.cu_seqlens, packing.max_length
    out = varlen_attn(q, k.contiguous(), v.contiguous(), cu, cu, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def _log_once(choice: str) -> None:
    if choice not in _logged:
        _logged.add(choice)
        log.info("packed attention: %s", choice)


AttentionInterface.register(NAME, packed_attention)
