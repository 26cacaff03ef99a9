"""Rewards on the form of the text. None of them raises on any text, and all are bounded in time.

``regex_format`` runs on the ``regex`` package: it reads what ``re`` reads, lookaheads and back-references included, and
a match can be given up after a time, which ``re`` cannot do. Engines that are linear in the text, such as RE2, would
need no limit, but refuse lookaheads, which tag formats are usually written with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import regex  # type: ignore[import-untyped]  # comes with transformers

from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards.decorator import explains, factory, reward

_log = logging.getLogger(__name__)

MATCH_LIMIT_S = 1.0
"""What one match of ``regex_format`` may take; the text then scores 0."""


def exact(completion: str, answer: object) -> float:
    """1 when the completion is the answer, blanks around either left out."""
    return float(completion.strip() == str(answer).strip())


@explains(exact)
def _exact_explained(completion: str, answer: object) -> str:
    return f"{_short(completion.strip())} beside the answer {_short(str(answer).strip())}"


def ends_with_answer(completion: str, answer: object) -> float:
    """1 when the completion ends with the answer as a word of its own; a full stop after it is left out."""
    text, wanted = completion.strip().removesuffix("."), str(answer).strip()
    if not wanted or not text.endswith(wanted):
        return 0.0
    before = text[: -len(wanted)][-1:]
    return float(not (before.isalnum() and wanted[0].isalnum()))


@factory
def regex_format(pattern: str, *, name: str = "regex_format") -> Callable[[str], float]:
    """1 when the whole completion, stripped, matches ``pattern`` (dot: any character).

    A match that takes more than ``MATCH_LIMIT_S`` is given up and scores 0, with a warning the first time. Raises
    ``ConfigError`` at once for a pattern that is not valid.
    """
    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise ConfigError(f"pattern {pattern!r}: {error}") from None
    warned: list[int] = []

    def in_time(text: str) -> bool | None:
        try:
            # concurrent: other threads run meanwhile
            return compiled.fullmatch(text, timeout=MATCH_LIMIT_S, concurrent=True) is not None
        except (TimeoutError, MemoryError):
            return None

    @reward(name=name)
    def matches(completion: str) -> float:
        found = in_time(completion.strip())
        if found is None and not warned:
            warned.append(len(completion))
            _log.warning(
                "reward %s: matching a text of %d characters was given up after %g s, which scores 0: the pattern "
                "backtracks without end (nested repetition such as (a+)+?)",
                name,
                len(completion),
                MATCH_LIMIT_S,
            )
        return float(found is True)

    @explains(matches)
    def explain(completion: str) -> str:
        found = in_time(completion.strip())
        if found is None:
            return f"given up after {MATCH_LIMIT_S:g} s: the pattern backtracks without end"
        return "the whole completion matches" if found else "the completion as a whole does not match"

    return matches


@factory
def xml_tags(
    tags: Sequence[str] = ("think", "answer"), *, opened: bool = False, partial: bool = False, name: str = "xml_tags"
) -> Callable[[str], float]:
    """1 when the completion is exactly one ``<tag>…</tag>`` for each of ``tags``, in their order.

    Blanks may stand between them and nothing else; inside one, none of the tags. ``opened``: the prompt ends with the
    first opening tag. ``partial``: every tag that is opened once and then closed once earns as much as the rest of the
    form, 1 / (tags + 1) each. Raises ``ConfigError`` for no tags, the same twice, or what cannot be a tag's name.
    """
    if isinstance(tags, str) or not tags or len(set(tags)) != len(tags):
        raise ConfigError(f"tags = {tags!r}: a list of different names, such as ['think', 'answer']")
    if bad := [tag for tag in tags if not isinstance(tag, str) or not regex.fullmatch(r"[\w:.-]+", tag)]:
        raise ConfigError(f"tags: {bad[0]!r} is no name of a tag: letters, digits and . _ : -, without the brackets")
    any_tag = regex.compile(rf"<(/?)({'|'.join(regex.escape(tag) for tag in tags)})>")
    wanted = [(slash, tag) for tag in tags for slash in ("", "/")]

    def read(completion: str) -> tuple[list[tuple[str, str]], bool]:
        """The tags in their order, and whether only blanks stand outside of them."""
        text = f"<{tags[0]}>{completion}" if opened else completion
        found, position, clean = [], 0, True
        for mark in any_tag.finditer(text):
            if not mark[1]:
                clean = clean and not text[position : mark.start()].strip()
            found.append((mark[1], mark[2]))
            position = mark.end()
        return found, clean and not text[position:].strip()

    def paired(found: list[tuple[str, str]]) -> list[str]:
        """Tags that are opened once and closed once, in this order."""
        return [tag for tag in tags if [slash for slash, other in found if other == tag] == ["", "/"]]

    @reward(name=name)
    def form(completion: str) -> float:
        found, clean = read(completion)
        if found == wanted and clean:
            return 1.0
        return len(paired(found)) / (len(tags) + 1) if partial else 0.0

    @explains(form)
    def explain(completion: str) -> str:
        found, clean = read(completion)
        if missing := [tag for tag in tags if tag not in paired(found)]:
            return f"not opened once and closed once: {', '.join(missing)}"
        if found != wanted:
            return f"the tags do not follow each other as {', '.join(tags)}"
        return "the form is kept" if clean else "there is text outside of the tags"

    return form


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]} … {text[-28:]}")
