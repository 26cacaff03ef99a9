"""``@reward`` and ``@metric``: tag a plain function and change nothing else about it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, get_args, overload

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards.combining import Terms, Weight

Style = Literal["posttrain", "group", "trl", "verifiers", "verl", "openrlhf", "areal"]
"""Calling convention of a reward function; ``signature.py`` says what each receives."""

F = TypeVar("F", bound=Callable[..., Any])
ATTRIBUTE = "__posttrain_reward__"
FACTORY = "__posttrain_factory__"
EXPLANATION = "__posttrain_explanation__"
SHORTCUT = "__posttrain_shortcut__"


STYLES: tuple[Style, ...] = get_args(Style)
OnError = Literal["raise", "zero", "skip"]
"""What an exception of a reward function means: the run stops, the sample scores 0, or the reward does not apply."""


@dataclass(slots=True, frozen=True)
class RewardTag:
    """What ``@reward`` or ``@metric`` leaves on a function."""

    weight: Weight = 1.0
    name: str | None = None
    style: Style | None = None
    timeout: float | None = None
    """Seconds a call may take; the sample then scores 0."""
    on_error: OnError = "raise"
    cache: bool = False
    """Equal arguments, equal score: called once in a run."""
    isolate: bool = False
    """Called in a process of its own kind, which a time limit or a crash ends without harm."""
    memory_mib: int | None = None
    """Memory that such a process may use."""
    concurrency: int = 32
    """Calls of an asynchronous function at once."""
    requires: Sequence[str] = ()
    """Rewards that must be above 0 for this one's score to count; it counts as 0 otherwise."""
    clip: tuple[float, float] | None = None
    """Smallest and largest score, before the weight."""
    metric: bool = False
    """Recorded, but no part of the reward."""

    def __post_init__(self) -> None:
        try:
            self.terms  # noqa: B018  (made to be checked)
        except ValueError as error:
            raise RewardError(f"@reward: {error}") from None
        for setting, allowed in (("style", get_args(Style)), ("on_error", get_args(OnError))):
            value = getattr(self, setting)
            if value not in allowed and (setting, value) != ("style", None):
                raise RewardError(f"@reward({setting}={value!r}): {setting} is one of {', '.join(allowed)}")
        for setting in ("timeout", "memory_mib", "concurrency"):
            value = getattr(self, setting)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise RewardError(f"@reward({setting}={value!r}): {setting} is a number above 0")

    @property
    def terms(self) -> Terms:
        """How the score enters the reward."""
        return Terms(self.weight, self.requires, self.clip, self.metric)

    @property
    def isolated(self) -> bool:
        """Whether a synchronous function runs in the pool of processes: only there can a limit be enforced."""
        return self.isolate or self.timeout is not None or self.memory_mib is not None


class Settings(TypedDict, total=False):
    """Keywords of ``@reward``, as in ``RewardTag``."""

    weight: Weight
    name: str
    style: Style
    timeout: float
    on_error: OnError
    cache: bool
    isolate: bool
    memory_mib: int
    concurrency: int
    requires: Sequence[str]
    clip: tuple[float, float]


class MetricSettings(TypedDict, total=False):
    """Keywords of ``@metric``: ``@reward``'s but for ``weight``, ``requires`` and ``clip``."""

    name: str
    style: Style
    timeout: float
    on_error: OnError
    cache: bool
    isolate: bool
    memory_mib: int
    concurrency: int


@overload
def reward(function: F) -> F: ...
@overload
def reward(**settings: Unpack[Settings]) -> Callable[[F], F]: ...
def reward(function: F | None = None, **settings: Unpack[Settings]) -> F | Callable[[F], F]:
    """Mark a function as a reward; it stays the same function and is called as before.

    ``weight`` multiplies its score in the total: a number, which may be negative, or points ``[(step, weight), …]``,
    linear in between. ``requires`` names rewards that must be above 0 for the score to count, ``clip`` its range.
    ``name`` stands in the metrics in place of the function's own, ``style`` settles the calling convention where the
    signature leaves it open. ``timeout`` seconds, ``memory_mib`` and ``isolate`` run a synchronous function in a pool
    of processes; ``on_error`` says what an exception means; ``cache`` calls it once for equal arguments;
    ``concurrency`` bounds calls of an asynchronous one.
    Raises ``RewardError`` for a setting out of range or something that cannot be called.
    """
    return _mark(function, RewardTag(**settings), "reward")


@overload
def metric(function: F) -> F: ...
@overload
def metric(**settings: Unpack[MetricSettings]) -> Callable[[F], F]: ...
def metric(function: F | None = None, **settings: Unpack[MetricSettings]) -> F | Callable[[F], F]:
    """Mark a function whose score is recorded like a reward's but is no part of the total. Settings as ``reward``."""
    return _mark(function, RewardTag(weight=0.0, metric=True, **settings), "metric")


def _mark(function: F | None, tag: RewardTag, decorator: str) -> F | Callable[[F], F]:
    def mark(target: F) -> F:
        if not callable(target):
            raise RewardError(
                f"@{decorator} stands on a function, not on {target!r}; settings are keywords: @reward(weight=2)"
            )
        try:
            setattr(target, ATTRIBUTE, tag)
        except AttributeError:
            raise RewardError(
                f"@{decorator} cannot tag {target!r} (bound methods take no attributes): tag the function in its class"
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


def factory(function: F) -> F:
    """Mark a function that makes a reward from settings, as a configuration gives them: ``settings = {…}``."""
    setattr(function, FACTORY, True)
    return function


def is_factory(function: Callable[..., Any]) -> bool:
    """Whether ``factory`` stands on it."""
    return bool(getattr(function, FACTORY, False))


def explains(rewarded: Callable[..., Any]) -> Callable[[F], F]:
    """Mark the function that says in a line why ``rewarded`` gave its score; it takes the same arguments."""

    def mark(explanation: F) -> F:
        setattr(rewarded, EXPLANATION, explanation)
        return explanation

    return mark


def explanation_of(function: Callable[..., Any]) -> Callable[..., str] | None:
    """What explains a reward's score, if anything does."""
    found: Callable[..., str] | None = getattr(function, EXPLANATION, None)
    return found


def shortcut(rewarded: Callable[..., Any]) -> Callable[[F], F]:
    """Mark the function that scores what needs no process of its own, and gives ``None`` for the rest. It takes the
    same arguments as ``rewarded``, an isolated one, and runs in the event loop: it must be quick on any text.
    """

    def mark(quick: F) -> F:
        setattr(rewarded, SHORTCUT, quick)
        return quick

    return mark


def shortcut_of(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """What answers for an isolated reward where that is easy, if anything does: it knows of no arguments bound."""
    if isinstance(function, functools.partial):
        return None
    found: Callable[..., Any] | None = getattr(function, SHORTCUT, None)
    return found
