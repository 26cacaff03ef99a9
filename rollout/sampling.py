"""One token a row from a row of logits: temperature, min-p, top-k and top-p in vLLM's order, and the draw itself.

Shape letters: B sequences, V vocabulary. Arithmetic is float32, or float64 where the logits are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.rl.types import SamplingParams


def processed_logprobs(logits_BV: Tensor, params: SamplingParams, vocab_size: int) -> Tensor:
    """Log-probabilities [B, V] of the distribution to draw from: ``-inf`` outside the kept set, renormalised inside.

    Ids from ``vocab_size`` on (a padded vocabulary) are never kept. At temperature 0 the result is the plain
    log-softmax, as vLLM reports it: greedy choice is left to ``draw``, truncation cannot change it.
    """
    logits = logits_BV.double() if logits_BV.dtype == torch.float64 else logits_BV.float()
    if vocab_size < logits.shape[-1]:
        logits = logits.clone()
        logits[:, vocab_size:] = -torch.inf
    if params.temperature == 0:
        return logits.log_softmax(-1)
    logits = logits / params.temperature
    if params.min_p > 0:
        floor = logits.max(-1, keepdim=True).values + torch.tensor(params.min_p, dtype=torch.float64).log().item()
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if 0 < params.top_k < vocab_size:
        kth = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1:
        logits = _keep_nucleus(logits, params.top_p)
    return logits.log_softmax(-1)


def _keep_nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Keep the most probable tokens until their mass reaches ``top_p`` (1904.09751); the first always stays."""
    ascending, order = logits_BV.sort(dim=-1)
    below = ascending.softmax(-1).cumsum(-1)
    dropped = below <= 1 - top_p
    dropped[:, -1] = False
    return logits_BV.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)


def draw(logprobs_BV: Tensor, uniforms_B: Tensor, *, greedy: bool) -> Tensor:
    """Token ids [B] by inversion of the cumulative distribution; one float64 uniform in [0, 1) a row.

    A row depends on its own logits and uniform only, whatever else is in the batch and on whatever device.
    """
    if greedy:
        return logprobs_BV.argmax(-1)
    cumulative = logprobs_BV.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding must not lift the target to the total: the first entry above it would lie beyond the vocabulary.
    target = torch.minimum(uniforms_B[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def uniforms(seeds: list[int], length: int) -> Tensor:
    """float64 [B, length] on the CPU, each row from a generator of its own."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)
