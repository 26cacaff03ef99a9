"""REINFORCE++-baseline (2501.03262): group mean subtracted, then whitened over all tokens of the step."""

from __future__ import annotations

from typing import Literal

from posttrain.rl.algorithms.advantages import AdvantageName
from posttrain.rl.algorithms.policy import ClippedPolicyGradient


class ReinforcePPBaseline(ClippedPolicyGradient):
    """REINFORCE++ for several completions a prompt."""

    name: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"
    advantage: AdvantageName = "reinforce_pp_baseline"
