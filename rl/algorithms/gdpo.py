"""GDPO (2601.05242): each reward standardised in its group by itself, so that none drowns another."""

from __future__ import annotations

from typing import Literal

from posttrain.rl.algorithms.advantages import AdvantageName
from posttrain.rl.algorithms.policy import Aggregation, ClippedPolicyGradient


class GDPO(ClippedPolicyGradient):
    """Group reward-decoupled normalisation, on GRPO's loss."""

    name: Literal["gdpo"] = "gdpo"
    advantage: AdvantageName = "gdpo"
    aggregation: Aggregation = "sequence_mean"
