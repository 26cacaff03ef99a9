"""One reward function in another library's signature, and what it makes of completions written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CHAT = [{"role": "system", "content": "Think, then answer."}, {"role": "user", "content": "What is 6 times 7?"}]
TEXT = "What is 6 times 7?"


@dataclass(frozen=True)
class Case:
    """Completions of one prompt with the scores worked out by hand."""

    function: Callable[..., Any]
    style: str
    completions: Sequence[str]
    expected: Sequence[float | None]
    columns: Mapping[str, Any]
    prompt: str | list[dict[str, str]] = TEXT
    completion_ids: Sequence[Sequence[int]] = ()
    """By default as many tokens as the text has letters."""
