"""BNPO, TRL's name: the clipped token ratio over the micro-batch's own tokens.

The one loss that depends on how a step is cut into micro-batches.
"""

from __future__ import annotations

from typing import Literal

from posttrain.rl.algorithms.policy import Aggregation, ClippedPolicyGradient


class BNPO(ClippedPolicyGradient):
    """Loss normalised by the micro-batch's own tokens; kept for comparison with TRL."""

    name: Literal["bnpo"] = "bnpo"
    aggregation: Aggregation = "micro_batch_mean"
