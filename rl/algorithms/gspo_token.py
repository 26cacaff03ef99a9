"""GSPO-token (2507.18071, section 4.3): GSPO's value and clipping, with a gradient that may differ token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from posttrain.rl.algorithms.policy import Aggregation, ClippedPolicyGradient

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.rl.algorithms.ops import Tokens


class GSPOToken(ClippedPolicyGradient):
    """GSPO for advantages that vary inside a sequence; where they do not, the gradient is GSPO's."""

    name: Literal["gspo_token"] = "gspo_token"
    aggregation: Aggregation = "sequence_mean"
    clip_low: NonNegativeFloat = 3e-4
    clip_high: NonNegativeFloat = 4e-4

    def ratio(self, tokens: Tokens) -> Tensor:
        """[T], the value of the sequence's ratio with the gradient of the token's."""
        sequence = tokens.spread(tokens.sequence_mean(tokens.log_ratio)).exp().detach()
        return sequence * (tokens.logprobs - tokens.logprobs.detach()).exp()
