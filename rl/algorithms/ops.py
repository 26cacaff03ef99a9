"""Arithmetic on packed tokens that every loss shares. Tensor methods only, so that importing this costs no torch.

Shape letters: B sequences, T packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.rl.algorithms.base import LossInputs

LOG_LIMIT = 20.0
"""Log-ratios are held to ±20 before ``exp``: an infinite ratio times a zero gradient would be NaN."""

KlEstimator = Literal["k1", "k2", "k3", "k1_ratio", "k3_ratio"]


@dataclass(slots=True, frozen=True)
class Tokens:
    """One micro-batch made safe: finite stand-ins where ``mask`` is false, and the index of each token's sequence."""

    logprobs: Tensor
    """[T], with gradient."""
    old_logprobs: Tensor
    """[T]."""
    advantages: Tensor
    """[T]."""
    mask: Tensor
    """bool [T]."""
    segments: Tensor
    """int64 [T], which sequence a token is in."""
    counts: Tensor
    """[B], loss tokens of each sequence, in the type of ``logprobs``."""
    ref_logprobs: Tensor | None
    """[T]."""
    rollout_logprobs: Tensor | None
    """[T]."""
    entropy: Tensor | None
    """[T]."""

    @classmethod
    def of(cls, inputs: LossInputs) -> Tokens:
        """Select with ``where`` first: whatever stands at masked positions then reaches neither value nor gradient."""
        mask = inputs.loss_mask
        segments = segment_ids(inputs.cu_seqlens, mask.numel())
        zeros = inputs.logprobs.new_zeros(inputs.cu_seqlens.numel() - 1)
        return cls(
            logprobs=inputs.logprobs.where(mask, 0.0),
            old_logprobs=inputs.old_logprobs.detach().where(mask, 0.0),
            advantages=inputs.advantages.detach().to(inputs.logprobs.dtype).where(mask, 0.0),
            mask=mask,
            segments=segments,
            counts=zeros.index_add(0, segments, mask.to(zeros.dtype)),
            ref_logprobs=_select(inputs.ref_logprobs, mask),
            rollout_logprobs=_select(inputs.rollout_logprobs, mask),
            entropy=None if inputs.entropy is None else inputs.entropy.where(mask, 0.0),
        )

    @property
    def log_ratio(self) -> Tensor:
        """[T], ``logprobs − old_logprobs`` held to ±20; 0 at masked positions."""
        return (self.logprobs - self.old_logprobs).clamp(-LOG_LIMIT, LOG_LIMIT)

    @property
    def sampler_log_ratio(self) -> Tensor:
        """[T], ``old_logprobs − rollout_logprobs`` held to ±20: the trainer's policy over the sampler's."""
        assert self.rollout_logprobs is not None, "rollout_logprobs are needed here"
        return (self.old_logprobs - self.rollout_logprobs).clamp(-LOG_LIMIT, LOG_LIMIT)

    @property
    def behavior_logprobs(self) -> Tensor:
        """[T], of the policy that sampled: ``rollout_logprobs`` where present, else ``old_logprobs``."""
        return self.old_logprobs if self.rollout_logprobs is None else self.rollout_logprobs

    @property
    def behavior_log_ratio(self) -> Tensor:
        """[T], ``logprobs − behavior_logprobs`` held to ±20."""
        return (self.logprobs - self.behavior_logprobs).clamp(-LOG_LIMIT, LOG_LIMIT)

    def sum(self, values: Tensor) -> Tensor:
        """Scalar, over loss tokens."""
        return values.where(self.mask, 0.0).sum()

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[T] → [B], over each sequence's loss tokens."""
        values = values.where(self.mask, 0.0)
        return values.new_zeros(self.counts.numel()).index_add(0, self.segments, values)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[T] → [B]; 0 for a sequence without loss tokens."""
        return self.sequence_sum(values) / self.counts.clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """[B] → [T], each sequence's value on all of its tokens."""
        return values[self.segments]


def _select(values: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if values is None else values.detach().where(mask, 0.0)


def segment_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T], the index of the sequence each packed token belongs to."""
    lengths = cu_seqlens.diff().long()
    index = lengths.new_ones(lengths.numel()).cumsum(0) - 1
    return index.repeat_interleave(lengths, output_size=num_tokens)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's ``−min(ratio·A, clip(ratio)·A)``; with ``dual_clip`` c at most ``−c·A`` where A < 0 (1912.09729, eq. 4)."""
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(ratio * advantages).minimum(clipped * advantages)
    if dual_clip is None:
        return loss
    return loss.minimum(-dual_clip * advantages).where(advantages < 0, loss)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor, estimator: KlEstimator) -> Tensor:
    """[T], an estimate of KL(policy ‖ reference) from one sample a token.

    As a loss, k1 has zero expected gradient and k3 that of the forward KL; k2, k1_ratio and k3_ratio give the gradient
    of the reverse KL (2512.02556, section 3.1). ``ratio`` keeps its gradient.
    """
    d = (ref_logprobs - logprobs).clamp(-LOG_LIMIT, LOG_LIMIT)
    if estimator == "k2":
        return d.square() / 2
    kl = -d if estimator.startswith("k1") else d.expm1() - d
    return kl * ratio if estimator.endswith("ratio") else kl


def aggregate(token_loss: Tensor, tokens: Tokens, inputs: LossInputs, how: str) -> Tensor:
    """Token losses → this micro-batch's share of the step's loss: shares add up, however the step is cut.

    ``micro_batch_mean`` alone does not: it divides by the micro-batch's own tokens.
    """
    sequences = max(inputs.num_sequences, 1)
    if how == "sequence_mean":
        return tokens.sequence_mean(token_loss).sum() / sequences
    total = tokens.sum(token_loss)
    if how == "token_mean":
        return total / max(inputs.num_loss_tokens, 1)
    if how == "sequence_sum":
        return total / sequences
    if how == "max_tokens":
        if inputs.max_tokens < 1:
            raise ValueError('aggregation = "max_tokens" divides by the generation budget: set LossInputs.max_tokens')
        return total / (sequences * inputs.max_tokens)
    assert how == "micro_batch_mean", how
    return total / tokens.counts.sum().clamp(min=1) / max(inputs.num_micro_batches, 1)
