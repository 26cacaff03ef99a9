"""Where a step's seconds go: named spans on the wall clock, overlapping where the phases do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

WAITING = frozenset({"wait", "log"})
"""Spans in which neither sampler nor trainer works."""


@dataclass(slots=True, frozen=True)
class Span:
    """One phase, in seconds since the timeline began."""

    name: str
    start: float
    stop: float


@dataclass(slots=True, frozen=True)
class Window:
    """A stretch of the timeline. Its spans lie within it; those of one name never overlap."""

    start: float
    stop: float
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.stop - self.start

    def phases(self) -> dict[str, float]:
        """Seconds of each name, in the order they first began."""
        totals: dict[str, float] = {}
        for span in self.spans:
            totals[span.name] = totals.get(span.name, 0.0) + span.stop - span.start
        return totals

    def idle(self) -> float:
        """Seconds in which no phase ran; ``WAITING`` is none."""
        working = [(span.start, span.stop) for span in self.spans if span.name not in WAITING]
        return self.seconds - sum(stop - start for start, stop in union(working))


class Timeline:
    """Collects spans; ``cut`` hands them out, one window after the other."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._cut_at = 0.0
        self._open: dict[object, tuple[str, float]] = {}
        self._closed: list[Span] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record what happens inside; an exception is recorded like any other end."""
        key = object()
        self._open[key] = (name, self.now())
        try:
            yield
        finally:
            _, start = self._open.pop(key)
            self._closed.append(Span(name, start, self.now()))

    def cut(self) -> Window:
        """The time since the last cut. A span that is still open is in it up to now, and goes on in the next."""
        start, stop = self._cut_at, self.now()
        running = [Span(name, began, stop) for name, began in self._open.values()]
        pieces: dict[str, list[tuple[float, float]]] = {}
        for span in sorted([*self._closed, *running], key=lambda span: span.start):
            pieces.setdefault(span.name, []).append((max(span.start, start), span.stop))
        spans = [Span(name, *piece) for name, found in pieces.items() for piece in union(found)]
        self._closed, self._cut_at = [], stop
        return Window(start, stop, tuple(sorted(spans, key=lambda span: span.start)))

    def now(self) -> float:
        """Seconds since the timeline began."""
        return self._clock() - self._began


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same points covered by disjoint intervals, in order; intervals that touch become one."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged
