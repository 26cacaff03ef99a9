"""Spans on a clock that is moved by hand: what overlaps counts once, what is cut goes on."""

from __future__ import annotations

import itertools
import random

import pytest

from posttrain.rl.timeline import Span, Timeline, Window, union


class Clock:
    """Seconds that pass when told to; it does not start at 0."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def timeline_of() -> tuple[Timeline, Clock]:
    clock = Clock()
    return Timeline(clock), clock


def test_spans_are_seconds_since_the_beginning_in_the_order_they_began() -> None:
    timeline, clock = timeline_of()
    clock.now += 1
    with timeline.span("train"):
        clock.now += 2
        with timeline.span("score"):
            clock.now += 4
        clock.now += 8
    window = timeline.cut()
    assert window == Window(0.0, 15.0, (Span("train", 1.0, 15.0), Span("score", 3.0, 7.0)))
    assert window.phases() == {"train": 14.0, "score": 4.0}
    assert window.idle() == 1.0, "the second before; what lies inside another phase adds nothing"


def test_a_span_that_is_still_open_is_cut_in_two() -> None:
    timeline, clock = timeline_of()
    with timeline.span("rollout"):
        clock.now += 3
        first = timeline.cut()
        clock.now += 5
    clock.now += 1
    second = timeline.cut()
    assert first == Window(0.0, 3.0, (Span("rollout", 0.0, 3.0),))
    assert second == Window(3.0, 9.0, (Span("rollout", 3.0, 8.0),))
    assert (first.idle(), second.idle(), second.seconds) == (0.0, 1.0, 6.0)
    assert timeline.cut().spans == ()


def test_overlapping_spans_of_one_name_are_one() -> None:
    timeline, clock = timeline_of()
    first, second, third = (timeline.span("reward") for _ in range(3))
    first.__enter__()
    clock.now += 1
    second.__enter__()
    clock.now += 1
    first.__exit__(None, None, None)
    clock.now += 2
    second.__exit__(None, None, None)
    clock.now += 4
    third.__enter__()
    clock.now += 8
    third.__exit__(None, None, None)
    window = timeline.cut()
    assert window.spans == (Span("reward", 0.0, 4.0), Span("reward", 8.0, 16.0))
    assert window.phases() == {"reward": 12.0} and window.idle() == 4.0


def test_an_exception_ends_a_span() -> None:
    timeline, clock = timeline_of()
    with pytest.raises(KeyError), timeline.span("load"):
        clock.now += 2
        raise KeyError
    clock.now += 1
    assert timeline.cut().spans == (Span("load", 0.0, 2.0),)


@pytest.mark.parametrize(("name", "idle"), [("wait", 6.0), ("log", 6.0), ("save", 1.0)])
def test_waiting_and_writing_are_idle_time(name: str, idle: float) -> None:
    window = Window(0.0, 10.0, (Span(name, 0.0, 8.0), Span("rollout", 5.0, 9.0)))
    assert window.idle() == idle


def test_union_covers_the_same_points() -> None:
    rng = random.Random(0)
    for _ in range(200):
        intervals = [(start, start + rng.randrange(1, 6)) for start in (rng.randrange(30) for _ in range(7))]
        covered = {point for start, stop in intervals for point in range(start, stop)}
        merged = union(intervals)
        assert {point for start, stop in merged for point in range(start, stop)} == covered
        assert sum(stop - start for start, stop in merged) == len(covered)
        assert all(one[1] < other[0] for one, other in itertools.pairwise(merged)), "disjoint and in order"
