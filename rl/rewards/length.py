"""Penalties on long completions: 0 where there is nothing to punish, at most −1. The weight says how much that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from posttrain.rl.algorithms.overlong import ramp
from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards.decorator import explains, factory, reward

Shape = Literal["linear", "cosine"]
Unit = Literal["tokens", "words"]


@factory
def length_penalty(
    target: int, budget: int, *, shape: Shape = "linear", unit: Unit = "tokens", name: str = "length_penalty"
) -> Callable[..., float]:
    """A penalty: 0 up to ``target`` tokens, falling to −1 at ``budget``.

    ``unit``: tokens, or words, which is what blanks separate. ``shape``: along a straight line, or half a cosine, which
    is flat at both ends. Raises ``ConfigError`` unless
    0 ≤ target < budget.
    """
    if not 0 <= target < budget < math.inf:
        raise ConfigError(f"target = {target}, budget = {budget}: 0 ≤ target < budget, counted in {unit}")
    for setting, value, kind in (("shape", shape, Shape), ("unit", unit, Unit)):
        if value not in get_args(kind):
            raise ConfigError(f"{setting} = {value!r}: {setting} is one of {', '.join(get_args(kind))}")

    def penalty(length: int) -> float:
        share = ramp(length, target, budget)
        return 0.0 - (share if shape == "linear" else (1 - math.cos(math.pi * share)) / 2)  # 0.0: never −0

    return _of_tokens(penalty, name) if unit == "tokens" else _of_words(penalty, name)


@factory
def soft_overlong(max_tokens: int, buffer: int, *, name: str = "soft_overlong") -> Callable[..., float]:
    """DAPO's soft overlong punishment (2503.14476, eq. 13), for any algorithm.

    0 up to ``max_tokens`` − ``buffer`` tokens, a straight line to −1 at ``max_tokens``, and −1 beyond. The algorithm
    ``dapo`` has it already, as ``overlong_buffer``: twice would count twice. Raises ``ConfigError`` unless
    0 ≤ buffer ≤ max_tokens.
    """
    if not 0 <= buffer <= max_tokens or max_tokens < 1:
        raise ConfigError(f"max_tokens = {max_tokens}, buffer = {buffer}: 0 ≤ buffer ≤ max_tokens, counted in tokens")
    return _of_tokens(lambda length: 0.0 - ramp(length, max_tokens - buffer, max_tokens), name)


def _of_tokens(penalty: Callable[[int], float], name: str) -> Callable[..., float]:
    @reward(name=name)
    def by_tokens(completion_ids: Sequence[int]) -> float:
        return penalty(len(completion_ids))

    @explains(by_tokens)
    def explain(completion_ids: Sequence[int] | None = None) -> str:
        if completion_ids is None:
            return "the tokens are not known here: the score is that of an empty completion"
        return f"{len(completion_ids)} tokens"

    return by_tokens


def _of_words(penalty: Callable[[int], float], name: str) -> Callable[..., float]:
    @reward(name=name)
    def by_words(completion: str) -> float:
        return penalty(len(completion.split()))

    @explains(by_words)
    def explain(completion: str) -> str:
        return f"{len(completion.split())} words"

    return by_words
