"""Rewards on the form of the text. None of them raises on any text."""

from __future__ import annotations

import re
from collections.abc import Callable

from posttrain.rl.rewards.decorator import factory


def exact(completion: str, answer: object) -> float:
    """1 when the completion is the answer, blanks around either left out."""
    return float(completion.strip() == str(answer).strip())


def ends_with_answer(completion: str, answer: object) -> float:
    """1 when the completion ends with the answer as a word of its own; a full stop after it is left out."""
    text, wanted = completion.strip().removesuffix("."), str(answer).strip()
    if not wanted or not text.endswith(wanted):
        return 0.0
    before = text[: -len(wanted)][-1:]
    return float(not (before.isalnum() and wanted[0].isalnum()))


@factory
def regex_format(pattern: str, *, name: str = "regex_format") -> Callable[[str], float]:
    """A reward that is 1 when the whole completion, stripped, matches ``pattern`` (dot: any character).

    Raises ``re.error`` at once for a pattern that is not valid.
    """
    compiled = re.compile(pattern, re.DOTALL)

    def matches(completion: str) -> float:
        return float(compiled.fullmatch(completion.strip()) is not None)

    matches.__name__ = matches.__qualname__ = name
    return matches


_TAGS = re.compile(
    r"<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>", re.DOTALL
)


def xml_tags(completion: str) -> float:
    """1 when the completion is exactly one ``<think>…</think>`` followed by one ``<answer>…</answer>``."""
    return float(_TAGS.fullmatch(completion.strip()) is not None)
