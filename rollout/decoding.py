"""Batched autoregressive decoding of a transformers causal LM with its key-value cache.

Shape letters: B sequences, S prompt positions (left-padded), V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from posttrain.rl.errors import EngineError
from posttrain.rollout import sampling

if TYPE_CHECKING:
    from torch import Tensor, nn

    from posttrain.rl.types import SamplingParams

FINISHED_SHARE = 0.25
"""Finished rows are dropped from the batch once they make up this share of it: each time costs a copy of the cache."""


@dataclass(slots=True, frozen=True)
class Request:
    """One sample to draw."""

    prompt_ids: tuple[int, ...]
    seed: int
    budget: int
    """Most tokens it may get."""


@dataclass(slots=True)
class Sample:
    """What was drawn."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


def decode(model: nn.Module, requests: Sequence[Request], params: SamplingParams, vocab_size: int) -> list[Sample]:
    """Draw every request at once, in order; equal prompts are computed once and their cache shared out."""
    samples = [Sample() for _ in requests]
    active = [row for row, request in enumerate(requests) if request.budget > 0]
    if not active:
        return samples
    batch = _Batch(model, [requests[row] for row in active])
    greedy = params.temperature == 0
    stops = frozenset(params.stop_token_ids)
    while True:
        logprobs_BV = sampling.processed_logprobs(batch.logits_BV, params, vocab_size)
        if not bool(logprobs_BV.amax(-1).isfinite().all()):
            raise EngineError("the model gave logits that are not finite: the weights or the adapter are broken")
        tokens_B = sampling.draw(logprobs_BV, batch.uniforms_B(), greedy=greedy)
        chosen_B = logprobs_BV.gather(1, tokens_B[:, None]).squeeze(1)
        finished = []
        for row, token, logprob in zip(active, tokens_B.tolist(), chosen_B.tolist()):
            sample = samples[row]
            if not (done := _is_finished(sample, requests[row])):
                sample.ids.append(token)
                sample.logprobs.append(logprob)
                sample.stopped = token in stops
                done = _is_finished(sample, requests[row])
            finished.append(done)
        if all(finished):
            return samples
        if sum(finished) >= FINISHED_SHARE * len(active):
            keep = [index for index, done in enumerate(finished) if not done]
            active = [active[index] for index in keep]
            tokens_B = batch.select(keep, tokens_B)
        batch.advance(tokens_B)


def _is_finished(sample: Sample, request: Request) -> bool:
    return sample.stopped or len(sample.ids) >= request.budget


class _Batch:
    """Rows being decoded together: their cache, attention mask and positions."""

    def __init__(self, model: nn.Module, requests: Sequence[Request]) -> None:
        """Compute each distinct prompt once, left-padded, and hand its cache to every row that starts with it."""
        self._model = model
        self._device = next(model.parameters()).device
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        budget = max(request.budget for request in requests)
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))
        width = max(len(prompt) for prompt in prompts)
        input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width + budget, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        mask = mask.to(self._device)
        self._cache = cast(Any, None)
        self._mask = mask
        self._width = width
        self._step = 0
        positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
        logits = self._forward(input_ids.to(self._device), positions)
        owner = {prompt: row for row, prompt in enumerate(prompts)}
        rows = torch.tensor([owner[request.prompt_ids] for request in requests], device=self._device)
        if len(requests) > len(prompts) or rows.tolist() != list(range(len(prompts))):
            self._cache.reorder_cache(rows)
        self.logits_BV = logits.index_select(0, rows)
        self._mask = mask.index_select(0, rows)
        self._positions = positions[:, -1].index_select(0, rows)
        self._uniforms = sampling.uniforms([request.seed for request in requests], budget).to(self._device)

    def _forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, V] of the last position; grows the cache."""
        extra = {"position_ids": positions} if self._takes_positions else {}
        output = self._model(
            input_ids=input_ids,
            attention_mask=self._mask[:, : self._width],
            past_key_values=self._cache,
            use_cache=True,
            **extra,
            **self._last_only,
        )
        self._cache = getattr(output, "past_key_values", None)
        if not hasattr(self._cache, "reorder_cache"):
            raise EngineError(
                f"{type(self._model).__name__} keeps no key-value cache in the usual form: "
                'use rollout.engine = "vllm" for this model'
            )
        return output.logits[:, -1]

    def uniforms_B(self) -> Tensor:
        """This step's random number of every row."""
        return self._uniforms[:, self._step]

    def select(self, keep: list[int], tokens_B: Tensor) -> Tensor:
        """Keep these rows only; returns their tokens."""
        rows = torch.tensor(keep, device=self._device)
        self._cache.reorder_cache(rows)
        self._mask = self._mask.index_select(0, rows)
        self._positions = self._positions.index_select(0, rows)
        self._uniforms = self._uniforms.index_select(0, rows)
        return tokens_B.index_select(0, rows)

    def advance(self, tokens_B: Tensor) -> None:
        """Feed one token a row."""
        self._step += 1
        self._width += 1
        self._positions = self._positions + 1
        self.logits_BV = self._forward(tokens_B[:, None], self._positions[:, None])
