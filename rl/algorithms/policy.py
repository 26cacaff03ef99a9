"""What every policy-gradient algorithm shares. A subclass states its token loss and its defaults.

``loss`` is a template: make the inputs safe, ask ``surrogate`` for the token losses, weigh them (top-entropy mask,
correction), add KL and entropy terms, divide by the step's counts.

Shape letters: B sequences, T packed tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from posttrain.rl.algorithms.advantages import ADVANTAGES, AdvantageName
from posttrain.rl.algorithms.base import AdvantageInputs, Algorithm, LossInputs, LossOutput
from posttrain.rl.algorithms.corrections import AnyCorrection
from posttrain.rl.algorithms.ops import KlEstimator, Tokens, aggregate, clipped_surrogate, kl_penalty
from posttrain.rl.algorithms.overlong import ramp
from posttrain.rl.metrics import Max, Mean, Metric, Sum

if TYPE_CHECKING:
    from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean", "sequence_sum", "max_tokens", "micro_batch_mean"]


@dataclass(slots=True, frozen=True)
class Surrogate:
    """Token losses before weights and division, and what to report about them; all [T]."""

    loss: Tensor
    ratio: Tensor
    """The importance ratio this loss looks at, of the token or of its sequence."""
    clipped_low: Tensor | None = None
    """bool, held back because the ratio is too small; ``None``: nowhere."""
    clipped_high: Tensor | None = None
    """bool, held back because the ratio is too large; ``None``: nowhere."""


class PolicyGradient(Algorithm):
    """An advantage, a surrogate loss, and the options that combine with any of them."""

    advantage: AdvantageName = "group"
    """How rewards become advantages."""
    std_epsilon: PositiveFloat = 1e-6
    """Added to every standard deviation (and to MaxRL's mean) that is divided by."""
    aggregation: Aggregation = "token_mean"
    """What the sum of token losses is divided by, always counted over the whole optimizer step. sequence_mean: each
    sequence's own tokens, then sequences; token_mean: all loss tokens; sequence_sum: sequences; max_tokens: sequences ×
    generation budget; micro_batch_mean: the micro-batch's tokens (depends on how the step is cut)."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty towards the reference policy (the base model)."""
    kl_estimator: KlEstimator = "k3_ratio"
    """k2, k1_ratio and k3_ratio have the gradient of the reverse KL; k3 that of the forward KL; k1 none on average."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; negative is a penalty."""
    correction: AnyCorrection | None = None
    """For a sampler that differs from the trainer: tis, mis, icepop or opsm, by name or with fields."""
    top_entropy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Train only on this share of the step's tokens, those of highest entropy (2506.01939: 0.2). The loss is still
    divided by all tokens."""
    overlong_filter: bool = False
    """Leave completions that ran into ``max_tokens`` out of the loss, its numerator and its denominator."""
    overlong_buffer: float = Field(default=0.0, ge=0, le=1)
    """Soft overlong punishment (DAPO): the last share of ``max_tokens`` over which the reward falls; 0: off."""
    overlong_penalty: NonNegativeFloat = 1.0
    """What the soft punishment takes away at the very end."""
    dynamic_sampling: bool = False
    """Draw other prompts in place of groups whose rewards are all equal (DAPO)."""

    @abstractmethod
    def surrogate(self, tokens: Tokens) -> Surrogate:
        """The token losses; ``tokens`` hold finite values everywhere, so plain arithmetic is safe."""

    def advantages(self, inputs: AdvantageInputs) -> Tensor:
        """[B], by the estimator named in ``advantage``."""
        return ADVANTAGES[self.advantage](inputs, self.std_epsilon)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Template of every policy-gradient loss."""
        tokens = Tokens.of(inputs)
        surrogate = self.surrogate(tokens)
        token_loss = surrogate.loss
        metrics = self._report(surrogate, tokens)
        if self.top_entropy is not None:
            token_loss = token_loss.where(self._uncertain(tokens, inputs.entropy_threshold), 0.0)
        if self.correction is not None:
            _need(tokens.rollout_logprobs, f"correction {self.correction.name}", "rollout_logprobs")
            weights = self.correction.weights(tokens).detach()
            token_loss = token_loss * weights
            metrics["policy/correction_weight"] = _mean(weights, tokens)
            metrics["policy/correction_kept"] = _mean((weights != 0).to(weights.dtype), tokens)
        if self.kl_coef:
            ref_logprobs = _need(tokens.ref_logprobs, "kl_coef", "ref_logprobs")
            kl = kl_penalty(tokens.logprobs, ref_logprobs, tokens.log_ratio.exp(), self.kl_estimator)
            token_loss = token_loss + self.kl_coef * kl
        if self.entropy_coef:
            token_loss = token_loss - self.entropy_coef * _need(tokens.entropy, "entropy_coef", "entropy")
        loss = aggregate(token_loss, tokens, inputs, self.aggregation)
        return LossOutput(loss, {"loss/total": Sum(loss.detach()), **metrics})

    def _uncertain(self, tokens: Tokens, threshold: float | None) -> Tensor:
        entropy = _need(tokens.entropy, "top_entropy", "entropy")
        if threshold is None:
            raise ValueError("top_entropy needs LossInputs.entropy_threshold: see batching.with_scores")
        return entropy.detach() >= threshold

    def _report(self, surrogate: Surrogate, tokens: Tokens) -> dict[str, Metric]:
        ratio = surrogate.ratio.detach()
        nowhere = tokens.mask.new_zeros(())
        flags = (nowhere if mask is None else mask for mask in (surrogate.clipped_low, surrogate.clipped_high))
        low, high = (mask.to(ratio.dtype).expand_as(ratio) for mask in flags)
        metrics: dict[str, Metric] = {
            "policy/ratio_mean": _mean(ratio, tokens),
            "policy/ratio_max": Max(ratio.where(tokens.mask, 0.0).max()),
            "policy/clip_fraction": _mean(low + high, tokens),
            "policy/clip_fraction_low": _mean(low, tokens),
            "policy/clip_fraction_high": _mean(high, tokens),
        }
        logprobs = tokens.logprobs.detach()
        if tokens.rollout_logprobs is not None:
            gap = tokens.sampler_log_ratio
            metrics["policy/kl_sampler"] = _mean(gap.expm1() - gap, tokens)
            metrics["policy/sampler_gap"] = _mean(gap.abs(), tokens)
        if tokens.ref_logprobs is not None:
            kl = kl_penalty(logprobs, tokens.ref_logprobs, logprobs.new_ones(()), "k3")
            metrics["policy/kl_ref"] = _mean(kl, tokens)
        if tokens.entropy is not None:
            metrics["policy/entropy"] = _mean(tokens.entropy.detach(), tokens)
        return metrics

    @property
    def needs_groups(self) -> bool:
        """Every estimator compares completions of one prompt, but REINFORCE++."""
        return self.advantage != "reinforce_pp"

    @property
    def needs_reference(self) -> bool:
        """Only for the KL penalty."""
        return self.kl_coef != 0

    @property
    def needs_rollout_logprobs(self) -> bool:
        """Only for a correction."""
        return self.correction is not None

    @property
    def needs_entropy_gradient(self) -> bool:
        """Only for the entropy bonus."""
        return self.entropy_coef != 0

    @property
    def entropy_quantile(self) -> float | None:
        """The complement of ``top_entropy``."""
        return None if self.top_entropy is None else 1 - self.top_entropy

    @property
    def drops_equal_groups(self) -> bool:
        """``dynamic_sampling``."""
        return self.dynamic_sampling

    @property
    def drops_truncated(self) -> bool:
        """``overlong_filter``."""
        return self.overlong_filter

    def length_penalty(self, length: int, max_tokens: int) -> float:
        """DAPO, eq. 13: 0 up to the buffer, a straight line inside it, −``overlong_penalty`` from ``max_tokens`` on."""
        if not self.overlong_buffer:
            return 0.0
        return -self.overlong_penalty * ramp(length, (1 - self.overlong_buffer) * max_tokens, max_tokens)


class ClippedPolicyGradient(PolicyGradient):
    """PPO's clipped surrogate on the token's ratio, or on whatever ``ratio`` a subclass puts in its place."""

    clip_low: NonNegativeFloat = 0.2
    """The ratio may fall to 1 − clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """The ratio may rise to 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Where the advantage is negative, the loss stops at this multiple of it (1912.09729: 3)."""

    def ratio(self, tokens: Tokens) -> Tensor:
        """[T], with gradient."""
        return tokens.log_ratio.exp()

    def surrogate(self, tokens: Tokens) -> Surrogate:
        """``−min(ratio·A, clip(ratio)·A)``."""
        ratio, advantages = self.ratio(tokens), tokens.advantages
        loss = clipped_surrogate(ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)
        low = (ratio < 1 - self.clip_low) & (advantages < 0)
        high = (ratio > 1 + self.clip_high) & (advantages > 0)
        return Surrogate(loss, ratio, low, high)


class SamplerAnchored(PolicyGradient):
    """A loss whose ratio is taken to the policy that sampled (``rollout_logprobs``), so that drift and the mismatch
    between sampler and trainer count alike; to ``old_logprobs`` where the sampler's are absent.
    """

    @model_validator(mode="after")
    def _no_second_ratio(self) -> Self:
        if self.correction is not None and self.correction.importance:
            raise ValueError(
                f"{self.name} already weighs by the ratio to the sampler, and correction {self.correction.name} would "
                "do it again: remove the correction (opsm combines)"
            )
        return self

    @property
    def needs_rollout_logprobs(self) -> bool:
        """Always."""
        return True


def _mean(values: Tensor, tokens: Tokens) -> Mean:
    return Mean(tokens.sum(values), tokens.mask.sum())


def _need(values: Tensor | None, field: str, name: str) -> Tensor:
    if values is None:
        raise ValueError(f"{field} needs LossInputs.{name}, which is missing")
    return values
