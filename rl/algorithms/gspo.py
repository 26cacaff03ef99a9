"""GSPO (2507.18071): one ratio a sequence, the geometric mean of its token ratios, clipped as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from posttrain.rl.algorithms.policy import Aggregation, ClippedPolicyGradient

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.rl.algorithms.ops import Tokens


class GSPO(ClippedPolicyGradient):
    """Group sequence policy optimization."""

    name: Literal["gspo"] = "gspo"
    aggregation: Aggregation = "sequence_mean"
    clip_low: NonNegativeFloat = 3e-4
    """Small, because the mean over a sequence moves far less than one token."""
    clip_high: NonNegativeFloat = 4e-4

    def ratio(self, tokens: Tokens) -> Tensor:
        """[T], the sequence's ratio on each of its tokens."""
        return tokens.spread(tokens.sequence_mean(tokens.log_ratio)).exp()
