"""GMPO (2507.20673): the geometric mean of token ratios, each clipped in log space on the side PPO clips."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from posttrain.rl.algorithms.policy import Aggregation, PolicyGradient, Surrogate

if TYPE_CHECKING:
    from posttrain.rl.algorithms.ops import Tokens


class GMPO(PolicyGradient):
    """Geometric-mean policy optimization."""

    name: Literal["gmpo"] = "gmpo"
    aggregation: Aggregation = "sequence_mean"
    clip_low: NonNegativeFloat = 0.4
    """Where A < 0 a log-ratio counts as −clip_low at least."""
    clip_high: NonNegativeFloat = 0.4
    """Where A ≥ 0 a log-ratio counts as clip_high at most."""

    def surrogate(self, tokens: Tokens) -> Surrogate:
        """``−A·exp(mean_t u)``."""
        log_ratio, negative = tokens.log_ratio, tokens.advantages < 0
        clipped = log_ratio.clamp(min=-self.clip_low).where(negative, log_ratio.clamp(max=self.clip_high))
        ratio = tokens.spread(tokens.sequence_mean(clipped)).exp()
        low = negative & (log_ratio < -self.clip_low)
        high = (tokens.advantages > 0) & (log_ratio > self.clip_high)
        return Surrogate(-tokens.advantages * ratio, ratio, low, high)
