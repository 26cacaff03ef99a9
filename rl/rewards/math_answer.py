"""Is the final answer right? By math-verify where installed, else by comparing the last number."""

from __future__ import annotations

import functools
import importlib.util
import re
from decimal import Decimal

from posttrain.rl.rewards.math_verdict import verdicts

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(rf"(?<![\w.,)])(?:-\s?)?\.\d+|(?:(?<![\w)])-\s?)?{_DIGITS}(?:\.\d+)?(?:/{_DIGITS})?", re.ASCII)
"""Thousands commas, a decimal part, a fraction; a minus behind a digit or bracket is a difference, not a sign."""


def final_answer(text: str) -> str | None:
    r"""What a text gives as its answer: the last ``\boxed{…}``, else what follows the last ``####`` on its line,
    else the last number; ``None`` where there is none.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    _, mark, after = text.rpartition("####")
    if mark and after.strip():
        return after.strip().splitlines()[0].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def math_answer(completion: str, answer: object) -> float:
    """1 when the completion's final answer equals ``answer`` as mathematics, else 0.

    A final answer that cannot be parsed scores 0. Numbers are compared as numbers, equal texts are equal, and the rest
    is decided by math-verify where it is installed (extra ``math``), in a process of its own.
    """
    given = final_answer(completion)
    if given is None:
        return 0.0
    wanted = final_answer(str(answer)) if "####" in str(answer) else str(answer).strip()
    if wanted is None:
        return 0.0
    left, right = _number(given), _number(wanted)
    if left is not None and right is not None:
        return float(left == right)
    if _plain(given) == _plain(wanted):
        return 1.0
    return float(verdicts().equal(given, wanted)) if _has_math_verify() else 0.0


def _last_boxed(text: str) -> str | None:
    r"""Content of the last complete ``\boxed{…}``, braces matched."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for position in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + 7 : position].strip()
        start = text.rfind("\\boxed{", 0, start)
    return None


def _number(text: str) -> Decimal | None:
    """A plain number in any of its usual dresses, else ``None``."""
    cleaned = text.strip().replace("\\$", "$").strip("$ ").rstrip(".")
    cleaned = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", cleaned).replace("- ", "-")
    if not re.fullmatch(r"[+-]?\$?(?:\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})", cleaned, re.ASCII):
        return None
    return Decimal(cleaned.replace("$", ""))


def _plain(text: str) -> str:
    return re.sub(r"[\s$]+", "", text)


@functools.cache
def _has_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None
