"""Groups of rollouts → advantages → packed micro-batches under a token budget. No padding anywhere.

Shape letters: B completions, K reward functions, T packed tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.rl.algorithms.base import AdvantageInputs, Algorithm
from posttrain.rl.metrics import Mean, Metric, Std
from posttrain.rl.packing import families, fill
from posttrain.rl.types import Rollout, RolloutGroup, Scores, TrainBatch


@dataclass(slots=True, frozen=True)
class BatchSettings:
    """How a batch is cut."""

    micro_batch_tokens: int
    """Tokens that a micro-batch costs (``rl.packing``); a longer sequence gets one of its own."""
    updates: int
    """Optimizer steps the groups are dealt out to, in order."""
    max_tokens: int
    """Generation budget of a completion."""
    temperature: float = 1.0
    """The sampler's."""
    share_prompts: bool = False
    """Whether the trainer computes a prompt once for its completions (``trainer.share_prompts``): it is counted once
    then, and they are kept together. One that cannot, because its model cannot be packed, needs more memory than this
    count says; where it has not got it, the micro-batches become smaller (``rl.service.micro_batches``)."""


@dataclass(slots=True, frozen=True)
class _Sequence:
    """One prompt and completion on its way into a pack."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    advantage: float
    rollout_logprobs: Sequence[float] | None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def assign_advantages(groups: Sequence[RolloutGroup], algorithm: Algorithm, max_tokens: int) -> dict[str, Metric]:
    """Write ``rollout.advantage`` of every rollout of one step; rewards carry the algorithm's length penalty from here
    on.

    A group is its place in ``groups``, never its prompt's text. Under the overlong filter truncated completions count
    in their group's mean and std (as in TRL: DAPO masks the loss alone, and the reward is real), but with no loss
    tokens. A completion to which no reward applies has none: NaN in, advantage 0 out.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {}
    weights = rollouts[0].weights
    assert all(rollout.weights == weights for rollout in rollouts), "a batch is scored with the weights of one step"
    penalties = [algorithm.length_penalty(len(r.completion.completion_ids), max_tokens) for r in rollouts]
    inputs = AdvantageInputs(
        rewards=_column([_total(r) + penalty for r, penalty in zip(rollouts, penalties, strict=True)]),
        group_ids=torch.tensor([index for index, group in enumerate(groups) for _ in group.rollouts]),
        lengths=torch.tensor([len(r.completion.completion_ids) if _trained(r, algorithm) else 0 for r in rollouts]),
        components=_column([_components(r, penalty) for r, penalty in zip(rollouts, penalties, strict=True)]),
        weights=_column([*weights.values(), 1.0]),
    )
    advantages = algorithm.advantages(inputs).tolist()
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        rollout.advantage = advantage
    return {
        "reward/length_penalty": Mean(sum(penalties), len(penalties)),
        "policy/advantage_std": Std.of(advantages),
        "policy/advantage_zero": Mean(sum(advantage == 0 for advantage in advantages), len(advantages)),
    }


def plan(groups: Sequence[RolloutGroup], algorithm: Algorithm, settings: BatchSettings) -> list[list[TrainBatch]]:
    """One list of micro-batches an optimizer step. No group is split between steps; a step without loss tokens
    (every completion empty, or dropped by the overlong filter) is left out.
    """
    steps = []
    for share in _deal(groups, settings.updates):
        sequences = [
            _Sequence(
                group.prompt.prompt_ids,
                rollout.completion.completion_ids,
                rollout.advantage,
                rollout.completion.rollout_logprobs,
            )
            for group in share
            for rollout in group.rollouts
            if _trained(rollout, algorithm)
        ]
        if sequences:
            steps.append(_pack_step(sequences, settings))
    return steps


def plan_supervised(
    examples: Sequence[tuple[Sequence[int], Sequence[int]]], micro_batch_tokens: int, max_tokens: int
) -> list[TrainBatch]:
    """One optimizer step of demonstrations (prompt ids, completion ids), every completion token with weight 1."""
    sequences = [_Sequence(prompt, completion, 1.0, None) for prompt, completion in examples if completion]
    return _pack_step(sequences, BatchSettings(micro_batch_tokens, 1, max_tokens)) if sequences else []


def with_scores(
    batches: Sequence[TrainBatch],
    old: Sequence[Scores] | None = None,
    ref: Sequence[Scores] | None = None,
    entropy_quantile: float | None = None,
) -> list[TrainBatch]:
    """The micro-batches of one optimizer step with old and reference logprobs, and the entropy threshold of all of its
    loss tokens (linear interpolation; it needs ``old``).
    """
    filled = list(batches)
    if old is not None:
        filled = [replace(b, old_logprobs=s.logprobs) for b, s in zip(filled, old, strict=True)]
    if ref is not None:
        filled = [replace(b, ref_logprobs=s.logprobs) for b, s in zip(filled, ref, strict=True)]
    if entropy_quantile is not None:
        assert old is not None, "the entropy threshold comes from the old policy's scores"
        entropy = [s.entropy[b.loss_mask.to(s.entropy.device)] for b, s in zip(filled, old, strict=True)]
        threshold = _quantile(torch.cat(entropy), entropy_quantile)
        filled = [replace(b, entropy_threshold=threshold) for b in filled]
    return filled


def _unscored(rollout: Rollout) -> bool:
    return bool(rollout.counted) and all(score is None for score in rollout.counted.values())


def _total(rollout: Rollout) -> float:
    """The weighted total, NaN where no reward function applied."""
    return math.nan if _unscored(rollout) else rollout.reward


def _components(rollout: Rollout, penalty: float) -> list[float]:
    """What counts of each score, in the order of the weights, and the length penalty as one more, of weight 1."""
    scores = [rollout.counted[name] for name in rollout.weights]
    return [*(math.nan if s is None else s for s in scores), math.nan if _unscored(rollout) else penalty]


def _column(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _trained(rollout: Rollout, algorithm: Algorithm) -> bool:
    """Whether a completion has loss tokens: not empty, and not dropped by the overlong filter."""
    truncated = rollout.completion.finish_reason == "length"
    return bool(rollout.completion.completion_ids) and not (truncated and algorithm.drops_truncated)


def _deal(groups: Sequence[RolloutGroup], updates: int) -> list[Sequence[RolloutGroup]]:
    """Consecutive shares whose sizes differ by one at most."""
    bounds = [len(groups) * index // updates for index in range(updates + 1)]
    return [groups[start:end] for start, end in itertools.pairwise(bounds)]


def _pack_step(sequences: Sequence[_Sequence], settings: BatchSettings) -> list[TrainBatch]:
    lengths = [len(sequence) for sequence in sequences]
    found = families([sequence.prompt_ids for sequence in sequences], lengths, share=settings.share_prompts)
    bins = fill(found, settings.micro_batch_tokens)
    num_loss_tokens = sum(len(sequence.completion_ids) for sequence in sequences)
    return [
        _pack([sequences[index] for index in members], settings, num_loss_tokens, len(sequences), len(bins))
        for members in bins
    ]


def _pack(
    sequences: Sequence[_Sequence],
    settings: BatchSettings,
    num_loss_tokens: int,
    num_sequences: int,
    num_micro_batches: int,
) -> TrainBatch:
    ids: list[int] = []
    positions: list[int] = []
    mask: list[bool] = []
    advantages: list[float] = []
    logprobs: list[float] = []
    bounds = [0]
    for sequence in sequences:
        prompt, completion = sequence.prompt_ids, sequence.completion_ids
        assert prompt, "a completion's first token can be trained on only after at least one prompt token"
        ids += [*prompt, *completion]
        positions += range(len(sequence))
        mask += [False] * len(prompt) + [True] * len(completion)
        advantages += [0.0] * len(prompt) + [sequence.advantage] * len(completion)
        if sequence.rollout_logprobs is not None:
            assert len(sequence.rollout_logprobs) == len(completion), "one sampler logprob a completion token"
            logprobs += [0.0] * len(prompt) + list(sequence.rollout_logprobs)
        bounds.append(len(ids))
    return TrainBatch(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        position_ids=torch.tensor(positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        loss_mask=torch.tensor(mask, dtype=torch.bool),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        num_loss_tokens=num_loss_tokens,
        num_sequences=num_sequences,
        num_micro_batches=num_micro_batches,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        rollout_logprobs=torch.tensor(logprobs, dtype=torch.float32) if logprobs else None,
    )


def _quantile(values: Tensor, q: float) -> float:
    """Linear interpolation between order statistics; ``torch.quantile`` refuses more than 16 million values."""
    if values.numel() == 0:
        return 0.0
    ordered = values.double().sort().values
    place = q * (ordered.numel() - 1)
    low = math.floor(place)
    high = min(low + 1, ordered.numel() - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
