"""Rewards: tag a function with ``reward``, run functions with ``Rubric``, find them by name with ``resolve``."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards import references
from posttrain.rl.rewards.decorator import RewardTag, reward
from posttrain.rl.rewards.math_answer import math_answer
from posttrain.rl.rewards.rubric import Rubric
from posttrain.rl.rewards.text_format import ends_with_answer, exact, regex_format, xml_tags

__all__ = ["BUILT_INS", "RewardTag", "Rubric", "reference", "regex_format", "resolve", "reward"]

BUILT_INS: dict[str, Callable[..., Any]] = {
    "ends_with_answer": ends_with_answer,
    "exact": exact,
    "math_answer": math_answer,
    "xml_tags": xml_tags,
}
"""Reward name in a configuration → function."""


def resolve(spec: str, base: Path | None = None) -> Callable[..., Any]:
    """The function behind a built-in's name, ``module:function`` or ``file.py:function`` (relative to ``base``).

    Raises ``ConfigError`` saying what is missing.
    """
    if spec in BUILT_INS:
        return BUILT_INS[spec]
    if ":" not in spec:
        near = difflib.get_close_matches(spec, BUILT_INS, n=1)
        hint = f"did you mean {near[0]}" if near else f"built in are {', '.join(sorted(BUILT_INS))}"
        raise ConfigError(f"reward {spec}: {hint}? Your own are written module:function or file.py:function")
    return references.import_function(spec, base)


def reference(function: Callable[..., Any]) -> str:
    """The spec that ``resolve`` takes back; raises ``ConfigError`` for lambdas and local functions."""
    for name, built_in in BUILT_INS.items():
        if built_in is function:
            return name
    return references.reference(function)
