"""Rewards: tag a function with ``reward``, run functions with ``Rubric``, find them by name with ``resolve``."""

from __future__ import annotations

from posttrain.rl.rewards.decorator import RewardTag, explains, factory, metric, reward
from posttrain.rl.rewards.registry import BUILT_INS, names, reference, resolve
from posttrain.rl.rewards.rubric import Rubric

__all__ = [
    "BUILT_INS",
    "RewardTag",
    "Rubric",
    "explains",
    "factory",
    "metric",
    "names",
    "reference",
    "resolve",
    "reward",
]
