"""REINFORCE++ (2501.03262): rewards whitened over all tokens of the step, no groups needed."""

from __future__ import annotations

from typing import Literal

from posttrain.rl.algorithms.advantages import AdvantageName
from posttrain.rl.algorithms.policy import ClippedPolicyGradient


class ReinforcePP(ClippedPolicyGradient):
    """PPO's clipped loss without a critic; works with one completion a prompt."""

    name: Literal["reinforce_pp"] = "reinforce_pp"
    advantage: AdvantageName = "reinforce_pp"
