"""OPO (2505.23585): the length-weighted baseline of least variance, strictly on-policy."""

from __future__ import annotations

from typing import Literal

from posttrain.rl.algorithms.advantages import AdvantageName
from posttrain.rl.algorithms.policy import ClippedPolicyGradient


class OPO(ClippedPolicyGradient):
    """On-policy optimization with the optimal reward baseline."""

    name: Literal["opo"] = "opo"
    advantage: AdvantageName = "opo"
