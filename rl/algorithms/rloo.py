"""RLOO (2402.14740): each completion against the mean of the others of its prompt."""

from __future__ import annotations

from typing import Literal

from posttrain.rl.algorithms.advantages import AdvantageName
from posttrain.rl.algorithms.policy import ClippedPolicyGradient


class RLOO(ClippedPolicyGradient):
    """REINFORCE leave-one-out; on-policy the clipped surrogate has REINFORCE's gradient."""

    name: Literal["rloo"] = "rloo"
    advantage: AdvantageName = "rloo"
