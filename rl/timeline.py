"""Where a step's seconds go: named spans on the wall clock, overlapping where the phases do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Span:
    """One phase, in seconds since the timeline began."""

    name: str
    start: float
    stop: float


class Timeline:
    """Collects spans; ``take`` empties it."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._spans: list[Span] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record what happens inside; an exception is recorded like any other end."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append(Span(name, start - self._began, time.perf_counter() - self._began))

    def take(self) -> list[Span]:
        """The spans that ended since the last call, in the order they ended."""
        taken, self._spans = self._spans, []
        return taken
