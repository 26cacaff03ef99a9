"""``@reward``: tags a plain function and changes nothing else about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args, overload

from posttrain.rl.errors import RewardError

Style = Literal["posttrain", "trl", "verifiers"]
"""Calling convention of a reward function; ``signature.py`` says what each receives."""

F = TypeVar("F", bound=Callable[..., Any])
ATTRIBUTE = "__posttrain_reward__"


@dataclass(slots=True, frozen=True)
class RewardTag:
    """What ``@reward`` leaves on a function."""

    weight: float = 1.0
    name: str | None = None
    style: Style | None = None


@overload
def reward(function: F) -> F: ...
@overload
def reward(*, weight: float = 1.0, name: str | None = None, style: Style | None = None) -> Callable[[F], F]: ...
def reward(
    function: F | None = None, *, weight: float = 1.0, name: str | None = None, style: Style | None = None
) -> F | Callable[[F], F]:
    """Mark a function as a reward; it stays the same function and is called as before.

    ``weight`` multiplies its score in the total (it may be negative), ``name`` stands in the metrics in place of the
    function's own, ``style`` settles the calling convention where the signature leaves it open.
    Raises ``RewardError`` for a weight that is not finite, an unknown style or something that cannot be called.
    """
    if style is not None and style not in get_args(Style):
        raise RewardError(f"@reward(style={style!r}): style is one of {', '.join(get_args(Style))}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise RewardError(f"@reward(weight={weight!r}): weight is a finite number")
    tag = RewardTag(float(weight), name, style)

    def mark(target: F) -> F:
        if not callable(target):
            raise RewardError(
                f"@reward stands on a function, not on {target!r}; settings are keywords: @reward(weight=2)"
            )
        try:
            setattr(target, ATTRIBUTE, tag)
        except AttributeError:
            raise RewardError(
                f"@reward cannot tag {target!r} (bound methods take no attributes): tag the function in its class"
            ) from None
        return target

    return mark if function is None else mark(function)


def tag_of(function: Callable[..., Any]) -> RewardTag:
    """The tag of a function, of what a ``functools.partial`` wraps, or the default tag."""
    seen: object = function
    while seen is not None:
        tag = getattr(seen, ATTRIBUTE, None)
        if isinstance(tag, RewardTag):
            return tag
        seen = cast("object", getattr(seen, "func", None))
    return RewardTag()
