"""VESPO (2602.10693): REINFORCE weighted by a smooth kernel of the whole sequence's importance weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from posttrain.rl.algorithms.ops import LOG_LIMIT
from posttrain.rl.algorithms.policy import SamplerAnchored, Surrogate

if TYPE_CHECKING:
    from posttrain.rl.algorithms.ops import Tokens

LOG_FLOOR = math.log(1e-8)


class VESPO(SamplerAnchored):
    """Variational sequence-level soft policy optimization."""

    name: Literal["vespo"] = "vespo"
    k_pos: PositiveFloat = 2.0
    """Power of W where A ≥ 0."""
    lambda_pos: PositiveFloat = 3.0
    """Decay in W where A ≥ 0."""
    k_neg: PositiveFloat = 3.0
    """Power of W where A < 0."""
    lambda_neg: PositiveFloat = 2.0
    """Decay in W where A < 0."""

    def surrogate(self, tokens: Tokens) -> Surrogate:
        """``−sg[φ(W)]·A·logprobs`` with φ(W) = e^λ·W^k·e^(−λW), so φ(1) = 1; log W in [ln 1e-8, 20]."""
        total = tokens.sequence_sum(tokens.behavior_log_ratio.detach()).clamp(LOG_FLOOR, LOG_LIMIT)
        log_w = tokens.spread(total)
        w = log_w.exp()
        up = (self.lambda_pos * (1 - w) + self.k_pos * log_w).exp()
        down = (self.lambda_neg * (1 - w) + self.k_neg * log_w).exp()
        phi = up.where(tokens.advantages >= 0, down)
        return Surrogate(-phi * tokens.advantages * tokens.logprobs, w)
