"""MaxRL (2602.02710): advantages over the mean reward, so that success is trained by maximum likelihood."""

from __future__ import annotations

from typing import Literal

from posttrain.rl.algorithms.advantages import AdvantageName
from posttrain.rl.algorithms.policy import ClippedPolicyGradient


class MaxRL(ClippedPolicyGradient):
    """Maximum-likelihood RL, for rewards of at least 0."""

    name: Literal["maxrl"] = "maxrl"
    advantage: AdvantageName = "maxrl"
