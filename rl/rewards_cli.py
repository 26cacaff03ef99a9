"""``posttrain rewards list | try``: what there is, and what one makes of a completion."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.rl.errors import PosttrainError
from posttrain.rl.rewards import Rubric, names, resolve
from posttrain.rl.rewards.decorator import explanation_of, is_factory
from posttrain.rl.rewards.registry import find
from posttrain.rl.rewards.signature import read
from posttrain.rl.types import Completion, Prompt


@dataclass(slots=True, frozen=True)
class Trial:
    """What a reward made of one completion."""

    score: float | None
    milliseconds: float
    """Of the second call: what starts once, such as a process, is running by then."""
    failure: str | None
    explanation: str | None


def listing() -> list[tuple[str, str, str, str]]:
    """Name, what it asks for, what it does, and where it comes from, of every reward that has a name."""
    rows = []
    for name, source in names().items():
        try:
            function = find(name)  # a factory itself: no settings are known here
        except PosttrainError as error:  # one broken package does not hide the others
            rows.append((name, "", str(error), source))
            continue
        rows.append((name, _asks_for(function), _first_line(function), source))
    return rows


def attempt(
    spec: str, completion: str, columns: Mapping[str, Any], settings: Mapping[str, Any], prompt: str = ""
) -> Trial:
    """Score one completion by one reward. Raises ``PosttrainError`` for what the function needs and is not there."""
    function = resolve(spec, Path.cwd(), settings)
    rubric = Rubric([function], {read(function).name: {"requires": ()}})  # what it requires is not there
    rubric.check(columns)
    group = [(Prompt("0-0", prompt, dict(columns)), [Completion((), (), completion, "stop", 0)])]

    async def twice() -> tuple[Any, float]:
        await rubric.score(group)
        began = time.perf_counter()
        [scored] = await rubric.score(group)
        return scored.rollouts[0], time.perf_counter() - began

    try:
        rollout, seconds = asyncio.run(twice())
    finally:
        rubric.close()
    [(name, score)] = rollout.rewards.items()
    return Trial(score, seconds * 1000, rollout.failures.get(name), _explanation(function, completion, columns))


def _asks_for(function: Callable[..., Any]) -> str:
    parameters = ", ".join(inspect.signature(function).parameters)
    return f"settings: {parameters}" if is_factory(function) else parameters


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _explanation(function: Callable[..., Any], completion: str, columns: Mapping[str, Any]) -> str | None:
    explain = explanation_of(function)
    if explain is None:
        return None
    offered = {**columns, "completion": completion}
    return explain(**{name: offered[name] for name in inspect.signature(explain).parameters if name in offered})
