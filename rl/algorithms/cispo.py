"""CISPO (2506.13585; 2510.13786): REINFORCE weighted by a capped ratio, so that no token loses its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from posttrain.rl.algorithms.policy import PolicyGradient, Surrogate

if TYPE_CHECKING:
    from posttrain.rl.algorithms.ops import Tokens


class CISPO(PolicyGradient):
    """Clipped importance-sampling policy optimization."""

    name: Literal["cispo"] = "cispo"
    cap: PositiveFloat = 5.0
    """The weight's upper bound, absolute (not 1 + ε)."""

    def surrogate(self, tokens: Tokens) -> Surrogate:
        """``−sg[min(ratio, cap)]·A·logprobs``."""
        ratio = tokens.log_ratio.exp().detach()
        loss = -ratio.clamp(max=self.cap) * tokens.advantages * tokens.logprobs
        return Surrogate(loss, ratio, clipped_high=ratio > self.cap)
