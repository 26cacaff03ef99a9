"""A whole optimizer step in fp64 on a tiny model, for tests that cut the same step in different ways."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from posttrain.rl.algorithms import Algorithm, LossInputs
from posttrain.rl.types import Completion, Prompt, Rollout, RolloutGroup, TrainBatch

VOCABULARY, WIDTH = 17, 6
LENGTHS = [1, 300, 2, 1, 150, 37, 80, 5, 211, 19, 3, 64, 299, 1, 12, 100, 47, 260, 8, 31, 175, 1, 90, 22]
GROUP_SIZES = [5, 1, 8, 4, 6]


def model(seed: int) -> list[Tensor]:
    """Embedding, recurrent-free mixing weight and output layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(VOCABULARY, WIDTH), (WIDTH, WIDTH), (WIDTH, VOCABULARY)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).mul(0.7).requires_grad_() for s in shapes]


def score(weights: list[Tensor], batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies [T]; each token sees the mean embedding of its own sequence before it. NaN outside the
    loss mask, so that anything that leaks out of it is seen.
    """
    embedding, mix, head = weights
    logprobs, entropies = [], []
    for ids in batch.input_ids.split(batch.cu_seqlens.diff().tolist()):
        x = embedding[ids]
        before = x.cumsum(0) / torch.arange(1, len(ids) + 1, dtype=torch.float64)[:, None]
        logits = torch.tanh(before @ mix + x)[:-1] @ head / batch.temperature
        table = logits.log_softmax(-1)
        first = table.new_full((1,), torch.nan)
        logprobs.append(torch.cat([first, table.gather(-1, ids[1:, None])[:, 0]]))
        entropies.append(torch.cat([first, -(table.exp() * table).sum(-1)]))
    nan = torch.nan
    return torch.cat(logprobs).where(batch.loss_mask, nan), torch.cat(entropies).where(batch.loss_mask, nan)


def groups(seed: int = 0) -> list[RolloutGroup]:
    """24 completions of lengths 1…300 in uneven groups."""
    rng = random.Random(seed)
    lengths = iter(LENGTHS)
    result = []
    for index, size in enumerate(GROUP_SIZES):
        prompt = Prompt(str(index), "same text", {}, tuple(rng.randrange(VOCABULARY) for _ in range(3 + index)))
        rollouts = []
        for _ in range(size):
            n = next(lengths)
            ids = tuple(rng.randrange(VOCABULARY) for _ in range(n))
            mu = tuple(-rng.uniform(2.0, 3.5) for _ in range(n))
            scores: dict[str, float | None] = {"a": rng.random(), "b": rng.choice([0.0, 1.0, None])}
            reward = scores["a"] + (scores["b"] or 0.0)  # type: ignore[operator]
            completion, weights = Completion(ids, mu, "", "stop", 0), {"a": 1.0, "b": 1.0}
            rollouts.append(Rollout(completion, scores, reward, counted=scores, weights=weights))
        result.append(RolloutGroup(prompt, rollouts))
    return result


def step_gradient(weights: list[Tensor], batches: Sequence[TrainBatch], algorithm: Algorithm) -> Tensor:
    """The flat parameter gradient after every micro-batch was added up, as a trainer does."""
    for weight in weights:
        weight.grad = None
    for batch in batches:
        logprobs, entropy = score(weights, batch)
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=old,
            advantages=batch.advantages,
            loss_mask=batch.loss_mask,
            cu_seqlens=batch.cu_seqlens,
            num_loss_tokens=batch.num_loss_tokens,
            num_sequences=batch.num_sequences,
            num_micro_batches=batch.num_micro_batches,
            max_tokens=batch.max_tokens,
            ref_logprobs=batch.ref_logprobs,
            rollout_logprobs=batch.rollout_logprobs,
            entropy=entropy,
            entropy_threshold=batch.entropy_threshold,
        )
        algorithm.loss(inputs).loss.backward()
    return torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])


def padded(batch: TrainBatch, width: int) -> TrainBatch:
    """The same micro-batch with every sequence padded on the right to ``width`` tokens outside the loss mask."""
    lengths = batch.cu_seqlens.diff().tolist()

    def pad(values: Tensor | None, fill: float) -> Tensor | None:
        if values is None:
            return None
        rows = [torch.cat([part, part.new_full((width - len(part),), fill)]) for part in values.split(lengths)]
        return torch.cat(rows)

    columns = {
        name: pad(getattr(batch, name), fill)
        for name, fill in [
            ("input_ids", 0),
            ("position_ids", 0),
            ("loss_mask", False),
            ("advantages", torch.nan),
            ("rollout_logprobs", torch.nan),
            ("old_logprobs", torch.nan),
            ("ref_logprobs", torch.nan),
        ]
    }
    bounds = torch.arange(0, width * len(lengths) + 1, width, dtype=torch.int32)
    return replace(batch, cu_seqlens=bounds, **columns)  # type: ignore[arg-type]
