"""DAPO (2503.14476): the clipped token ratio over all tokens of the step, with a higher upper bound."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat

from posttrain.rl.algorithms.policy import Aggregation, ClippedPolicyGradient


class DAPO(ClippedPolicyGradient):
    """Decoupled clip and dynamic sampling policy optimization."""

    name: Literal["dapo"] = "dapo"
    aggregation: Aggregation = "token_mean"
    clip_high: NonNegativeFloat = 0.28
    dynamic_sampling: bool = True
    overlong_buffer: float = Field(default=0.2, ge=0, le=1)
    """The paper's 4096 of 20480 tokens."""
