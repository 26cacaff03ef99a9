"""Dr.GRPO (2503.20783): no length and no std in any denominator."""

from __future__ import annotations

from typing import Literal

from posttrain.rl.algorithms.advantages import AdvantageName
from posttrain.rl.algorithms.policy import Aggregation, ClippedPolicyGradient


class DrGRPO(ClippedPolicyGradient):
    """GRPO done right: sums over sequences × generation budget, advantages R − mean."""

    name: Literal["dr_grpo"] = "dr_grpo"
    advantage: AdvantageName = "group_mean"
    aggregation: Aggregation = "max_tokens"
