"""Reinforcement-learning post-training: the public door. Everything behind it loads when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.rl.algorithms import ALGORITHMS as ALGORITHMS
    from posttrain.rl.algorithms import Algorithm as Algorithm
    from posttrain.rl.config import Config as Config
    from posttrain.rl.errors import PosttrainError as PosttrainError
    from posttrain.rl.rewards import metric as metric
    from posttrain.rl.rewards import reward as reward
    from posttrain.rl.service.run import RunResult as RunResult
    from posttrain.rl.service.train import train as train

_HOMES = {
    "ALGORITHMS": "posttrain.rl.algorithms",
    "Algorithm": "posttrain.rl.algorithms",
    "Config": "posttrain.rl.config",
    "PosttrainError": "posttrain.rl.errors",
    "RunResult": "posttrain.rl.service.run",
    "metric": "posttrain.rl.rewards",
    "reward": "posttrain.rl.rewards",
    "train": "posttrain.rl.service.train",
}

__all__ = ["ALGORITHMS", "Algorithm", "Config", "PosttrainError", "RunResult", "metric", "reward", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
