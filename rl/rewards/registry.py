"""Reward functions by name: built in, from installed packages, from modules and files."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards import references
from posttrain.rl.rewards.decorator import is_factory

ENTRY_POINTS = "posttrain.rewards"
"""Group under which an installed package offers rewards: ``name = "module:function"``."""

BUILT_INS: dict[str, str] = {
    "ends_with_answer": "posttrain.rl.rewards.text_format:ends_with_answer",
    "exact": "posttrain.rl.rewards.text_format:exact",
    "json_schema": "posttrain.rl.rewards.json_schema:json_schema",
    "judge": "posttrain.rl.rewards.judge:Judge",
    "language": "posttrain.rl.rewards.language:language",
    "length_penalty": "posttrain.rl.rewards.length:length_penalty",
    "math_answer": "posttrain.rl.rewards.math_answer:math_answer",
    "reasoning_gym": "posttrain.rl.rewards.reasoning_gym:reasoning_gym",
    "regex_format": "posttrain.rl.rewards.text_format:regex_format",
    "repetition": "posttrain.rl.rewards.repetition:repetition",
    "reward_model": "posttrain.rl.rewards.reward_model:RewardModel",
    "soft_overlong": "posttrain.rl.rewards.length:soft_overlong",
    "unit_tests": "posttrain.rl.rewards.unit_tests:unit_tests",
    "xml_tags": "posttrain.rl.rewards.text_format:xml_tags",
}
"""Reward name in a configuration → where it is; imported when it is asked for."""


def resolve(spec: str, base: Path | None = None, settings: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The reward behind a built-in's name, an installed package's, ``module:function`` or ``file.py:function``
    (relative to ``base``), with ``settings`` as keyword arguments: of the factory where it is one, else bound to the
    function. Raises ``ConfigError`` saying what is missing.
    """
    found = find(spec, base)
    if not settings and not is_factory(found):
        return found
    given, asked = dict(settings or {}), inspect.signature(found)
    try:
        (asked.bind if is_factory(found) else asked.bind_partial)(**given)
    except TypeError as error:
        known = ", ".join(asked.parameters) or "none"
        raise ConfigError(f"reward {spec}: settings: {error} (it knows: {known})") from None
    if not is_factory(found):
        return _bound(found, given)
    try:
        made: Callable[..., Any] = found(**given)
    except (ValueError, TypeError, re.error) as error:
        raise ConfigError(f"reward {spec}: settings: {error}") from error
    return made


def find(spec: str, base: Path | None = None) -> Callable[..., Any]:
    """What a spec names, a factory as it is. Raises ``ConfigError`` where there is nothing."""
    if spec in BUILT_INS:
        return references.import_function(BUILT_INS[spec])
    if ":" in spec:
        return references.import_function(spec, base)
    if (point := _entry_points().get(spec)) is not None:
        return references.import_function(point.value)
    known = names()
    near = difflib.get_close_matches(spec, known, n=1)
    hint = f"did you mean {near[0]}" if near else f"there are {', '.join(sorted(known))}"
    raise ConfigError(f"reward {spec}: {hint}? Your own are written module:function or file.py:function")


def names() -> dict[str, str]:
    """Every reward that has a name, and where it comes from: ``built in`` or a package."""
    found = dict.fromkeys(BUILT_INS, "built in")
    for point in _entry_points().values():
        found.setdefault(point.name, point.dist.name if point.dist is not None else point.value)
    return found


def reference(function: Callable[..., Any]) -> str:
    """The spec that ``resolve`` takes back; raises ``ConfigError`` for lambdas and local functions."""
    where = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    for name, built_in in BUILT_INS.items():
        if built_in == where:
            return name
    return references.reference(function)


def _bound(function: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    bound = functools.partial(function, **settings)
    functools.update_wrapper(bound, function)
    vars(bound).pop("__wrapped__")  # its signature is the partial's: what is bound is not asked for again
    return bound


def _entry_points() -> dict[str, EntryPoint]:
    """By name; of two packages that offer the same name, neither is taken for the other."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if (other := found.get(point.name)) is not None and other.value != point.value:
            raise ConfigError(f"two packages offer a reward {point.name}: {other.value} and {point.value}")
        found[point.name] = point
    return found
