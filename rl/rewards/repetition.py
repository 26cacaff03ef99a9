"""A penalty on text that repeats itself: by n-grams, or by how far it can be compressed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, get_args

from posttrain.rl.algorithms.overlong import ramp
from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards.decorator import explains, factory, reward

Unit = Literal["words", "characters", "tokens"]
Measure = Literal["ngrams", "compression"]
LONGEST_N = 64
"""Time and memory grow with n times the text."""


@factory
def repetition(
    n: int = 4,
    *,
    unit: Unit = "words",
    measure: Measure = "ngrams",
    free: float = 0.0,
    name: str = "repetition",
) -> Callable[..., float]:
    """A penalty: 0 for text that does not repeat itself, −1 for text that does nothing else.

    The share of repetition is ``1 − different n-grams / all n-grams`` of the words (what blanks separate), characters
    (for languages without blanks) or tokens; or, with ``measure = "compression"``, ``1 − compressed / plain`` bytes of
    the text by zlib, in which ordinary prose is at about a half. Up to ``free`` the share costs nothing, from there
    to 1 the score falls along a straight line. Raises ``ConfigError`` for a setting out of range.
    """
    if not 1 <= n <= LONGEST_N or not 0 <= free < 1:
        raise ConfigError(f"n = {n}, free = {free}: n is from 1 to {LONGEST_N}, and 0 ≤ free < 1")
    for setting, value, kind in (("unit", unit, Unit), ("measure", measure, Measure)):
        if value not in get_args(kind):
            raise ConfigError(f"{setting} = {value!r}: {setting} is one of {', '.join(get_args(kind))}")
    if measure == "ngrams" and unit == "tokens":
        return _of_tokens(n, free, name)

    def share(text: str) -> float:
        if measure == "compression":
            return compressible_share(text)
        return repeated_share(text.split() if unit == "words" else text, n)

    @reward(name=name)
    def by_text(completion: str) -> float:
        return 0.0 - ramp(share(completion), free, 1.0)

    @explains(by_text)
    def explain(completion: str) -> str:
        what = "can be compressed away" if measure == "compression" else f"of the {n}-grams of {unit} are repetitions"
        return f"{share(completion):.0%} {what}"

    return by_text


def repeated_share(items: Sequence[Hashable], n: int) -> float:
    """Share of the n-grams that stood before in the same text; 0 where there is not one."""
    total = len(items) - n + 1
    if total < 1:
        return 0.0
    different = {tuple(items[start : start + n]) for start in range(total)}
    return 1 - len(different) / total


def compressible_share(text: str) -> float:
    """How much of the UTF-8 bytes zlib saves, from 0 to 1."""
    plain = text.encode("utf-8", "surrogatepass")
    return max(0.0, 1 - len(zlib.compress(plain, 9)) / len(plain)) if plain else 0.0


def _of_tokens(n: int, free: float, name: str) -> Callable[..., float]:
    @reward(name=name)
    def by_tokens(completion_ids: Sequence[int]) -> float:
        return 0.0 - ramp(repeated_share(completion_ids, n), free, 1.0)

    @explains(by_tokens)
    def explain(completion_ids: Sequence[int] | None = None) -> str:
        if completion_ids is None:
            return "the tokens are not known here: the score is that of an empty completion"
        return f"{repeated_share(completion_ids, n):.0%} of the {n}-grams of tokens are repetitions"

    return by_tokens
