"""Is the final answer right? Numbers and lists of numbers are compared here, expressions by math-verify."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable

from posttrain.rl.rewards.decorator import explains, reward, shortcut
from posttrain.rl.rewards.math_notation import (
    Number,
    based,
    final_answer,
    interval,
    named,
    number,
    parts,
    simplified,
    stated_number,
)
from posttrain.rl.rewards.pool_worker import MARKER

TIMEOUT_S = 5.0
MAX_CHARACTERS = 1000
"""A longer final answer is not one."""
_UNORDERED = ("", "{}")

Leaf = Callable[[str, str], bool | None]
"""Whether two expressions are equal; ``None`` where it cannot tell."""


@reward(timeout=TIMEOUT_S, on_error="zero")
def math_answer(completion: str, answer: object) -> float:
    r"""1 when the completion's final answer equals ``answer`` as mathematics, else 0.

    The answer is looked for in ``\boxed{…}``, behind ``####`` or "the answer is", and is else the last number. Units,
    currency and "x =" may be left out; a percent sign too. What is no number is decided by math-verify where that is
    installed (extra ``math``), in a process that is stopped after 5 s; the rest is told at once.
    """
    quick = _at_once(completion, answer)
    if quick is not None:
        return quick
    if MARKER in os.environ:  # bounded from outside already
        return _by_math_verify(completion, answer)
    from posttrain.rl.rewards.pool import Crashed, TimedOut, shared

    arguments = {"completion": completion, "answer": answer}
    try:
        return float(shared().ask(_by_math_verify, arguments, timeout_s=TIMEOUT_S))
    except (TimedOut, Crashed):
        return 0.0


@shortcut(math_answer)
def _at_once(completion: str, answer: object) -> float | None:
    """The score where it takes no algebra, ``None`` where it does."""
    given, wanted = _both(completion, answer)
    if given is None or wanted is None or max(len(given), len(wanted)) > MAX_CHARACTERS:
        return float(given is not None and given == wanted)
    same = _equal(given, wanted, lambda _left, _right: None)
    return None if same is None and _has_math_verify() else float(same or False)


@explains(math_answer)
def _explained(completion: str, answer: object) -> str:
    """What was read as the answer, and how it compared."""
    given, wanted = _both(completion, answer)
    if given is None:
        return "the completion gives no answer: no box, no ####, no number"
    same = math_answer(completion, answer) == 1.0
    return f"read {given!r} as the answer, wanted {wanted!r}: {'equal' if same else 'not equal'}"


def _by_math_verify(completion: str, answer: object) -> float:
    """Without a time limit of its own: ``9^{9^{9^9}}`` would never end."""
    from posttrain.rl.rewards.math_verdict import verdict

    given, wanted = _both(completion, answer)
    assert given is not None and wanted is not None
    return float(_equal(given, wanted, verdict) or False)


def _both(completion: str, answer: object) -> tuple[str | None, str | None]:
    """The final answers of the two texts; a reference without ``####`` or a box is an answer as it stands."""
    reference = str(answer).strip()
    marked = "####" in reference or "\\boxed" in reference
    return final_answer(completion), final_answer(reference) if marked else reference


def _equal(given: str, wanted: str, leaf: Leaf) -> bool | None:
    """Whether two answers are the same one; ``None`` where ``leaf`` could not tell on some part of them."""
    left, right = simplified(given), simplified(wanted)
    if _letters(left) == _letters(right):
        return bool(left) or given == wanted
    if re.fullmatch(r"\(?[A-J]\)?", right):  # a choice: "B", "(B)", "B) 12"
        chosen = re.match(r"(?:[Oo]ption |[Cc]hoice )?\(?([A-J])(?:\)|[.:]|\s|$)", left)
        if chosen:
            return chosen[1] == right.strip("()")
    wanted_number = number(named(right)[1])
    if wanted_number is not None and number(named(left)[1]) is None:
        left = simplified(stated_number(left))
    return _compared(left, right, leaf)


def _compared(left: str, right: str, leaf: Leaf) -> bool | None:
    whole_left, whole_right = left, right
    (left_name, left), (right_name, right) = named(left), named(right)
    if left_name and right_name and left_name != right_name:
        return False
    if "=" in left or "=" in right:
        return leaf(whole_left, whole_right)
    (left, left_base), (right, right_base) = based(left), based(right)
    if left_base and right_base and left_base != right_base:
        return False
    if left == right:
        return True
    first, second = number(left), number(right)
    if first is not None and second is not None:
        return _same_number(first, second)
    if left[:1] in ("(", "[") or right[:1] in ("(", "["):
        left, right = interval(left), interval(right)
    several, wanted = _alternatives(left), _alternatives(right)
    if several is not None and wanted is not None:
        return _same_parts(several, wanted, leaf)
    return leaf(left, right)


def _same_number(left: Number, right: Number) -> bool:
    if left.unit and right.unit and left.unit != right.unit:
        return False
    if left.value == right.value:
        return True
    if left.percent == right.percent:
        return False
    percent, plain = (left, right) if left.percent else (right, left)
    return percent.value / 100 == plain.value


def _alternatives(text: str) -> tuple[str, list[str]] | None:
    r"""A list of answers with its brackets; ``\pm`` makes two of one."""
    found = parts(text)
    if found is None:
        if text.count(r"\pm") != 1:
            return None
        return "", [text.replace(r"\pm", sign) for sign in ("+", "-")]
    return found.brackets, found.items


def _same_parts(left: tuple[str, list[str]], right: tuple[str, list[str]], leaf: Leaf) -> bool | None:
    (left_brackets, given), (right_brackets, wanted) = left, right
    if len(given) != len(wanted):
        return False
    if left_brackets in _UNORDERED and right_brackets in _UNORDERED:
        return _matched(given, wanted, leaf)
    if left_brackets != right_brackets and "" not in (left_brackets, right_brackets):
        return False
    return _all(_compared(one, other, leaf) for one, other in zip(given, wanted, strict=True))


def _matched(given: list[str], wanted: list[str], leaf: Leaf) -> bool | None:
    """Each has one among the others, in any order."""
    rest, certain = list(wanted), True
    for item in given:
        verdicts = [_compared(item, other, leaf) for other in rest]
        if True in verdicts:
            rest.pop(verdicts.index(True))
        elif None in verdicts:
            certain = False
        else:
            return False
    return True if certain else None


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    found = list(verdicts)
    if False in found:
        return False
    return None if None in found else True


def _letters(text: str) -> str:
    """For comparing words: case counts only where it is all there is."""
    stripped = re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)  # 2 1/4 is not 21/4
    return stripped.lower() if len(stripped) > 1 and stripped.isalpha() else stripped


@functools.cache
def _has_math_verify() -> bool:
    return importlib.util.find_spec("math_verify") is not None


if MARKER in os.environ and _has_math_verify():
    importlib.import_module("posttrain.rl.rewards.math_verdict")  # seconds, which the first call's limit has not
