"""GRPO (2402.03300): the clipped token ratio, averaged within each sequence, then over sequences."""

from __future__ import annotations

from typing import Literal

from posttrain.rl.algorithms.policy import Aggregation, ClippedPolicyGradient


class GRPO(ClippedPolicyGradient):
    """Group relative policy optimization."""

    name: Literal["grpo"] = "grpo"
    aggregation: Aggregation = "sequence_mean"
