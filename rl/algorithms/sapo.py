"""SAPO (2511.20347): a sigmoid gate on the token ratio in place of hard clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from posttrain.rl.algorithms.policy import Aggregation, PolicyGradient, Surrogate

if TYPE_CHECKING:
    from posttrain.rl.algorithms.ops import Tokens


class SAPO(PolicyGradient):
    """Soft adaptive policy optimization."""

    name: Literal["sapo"] = "sapo"
    aggregation: Aggregation = "sequence_mean"
    tau_pos: PositiveFloat = 1.0
    """Steepness of the gate where A > 0."""
    tau_neg: PositiveFloat = 1.05
    """Steepness where A ≤ 0: higher, because pushing down one token lifts every other of the vocabulary."""

    def surrogate(self, tokens: Tokens) -> Surrogate:
        """``−σ(τ(ratio − 1))·(4/τ)·A``; on-policy its gradient is REINFORCE's."""
        ratio, advantages = tokens.log_ratio.exp(), tokens.advantages
        tau = advantages.new_full((), self.tau_pos).where(advantages > 0, self.tau_neg)
        return Surrogate(-(tau * (ratio - 1)).sigmoid() * (4 / tau) * advantages, ratio)
