"""Weights over the steps, clipping and gating by hand; what cannot be combined is refused in one line."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards.combining import Combining, Terms, total

# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "weight"),
    [(0, 1.0), (10, 1.0), (11, 1.1), (15, 1.5), (20, 2.0), (25, 1.0), (30, 0.0), (35, -1.0), (40, -2.0), (4000, -2.0)],
)
def test_a_weight_is_linear_between_its_points_and_constant_outside(step: int, weight: float) -> None:
    assert Terms([(10, 1), (20, 2.0), (40, -2.0)]).weight_at(step) == pytest.approx(weight, abs=1e-15)


def test_a_plain_weight_and_a_single_point_hold_for_every_step() -> None:
    assert [Terms(0.5).weight_at(step) for step in (0, 1, 10**9)] == [0.5] * 3
    assert [Terms([[7, -2]]).weight_at(step) for step in (0, 7, 10**9)] == [-2.0] * 3


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=6, unique=True).map(sorted),
    st.lists(st.floats(-100, 100), min_size=6, max_size=6),
    st.integers(0, 1100),
)
def test_a_weight_never_leaves_the_range_of_its_neighbours(steps: list[int], values: list[float], step: int) -> None:
    points = list(zip(steps, values, strict=False))
    before = [value for at, value in points if at <= step][-1:] or [points[0][1]]
    after = [value for at, value in points if at >= step][:1] or [points[-1][1]]
    low, high = sorted([*before, *after])
    assert low - 1e-9 <= Terms(points).weight_at(step) <= high + 1e-9
    for at, value in points:
        assert Terms(points).weight_at(at) == value


def test_weights_of_a_step_leave_metrics_out() -> None:
    combining = Combining({"a": Terms([(0, 0.0), (4, 1.0)]), "m": Terms(0.0, metric=True), "b": Terms(3)})
    assert combining.weights(0) == {"a": 0.0, "b": 3.0}
    assert combining.weights(1) == {"a": 0.25, "b": 3.0}


# --- what counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "counts"), [(-7.0, -1.0), (-1.0, -1.0), (0.25, 0.25), (2.0, 2.0), (9.0, 2.0)])
def test_clipping_comes_before_the_weight(score: float, counts: float) -> None:
    combining = Combining({"a": Terms(10.0, clip=(-1, 2))})
    assert combining.counted({"a": score}) == {"a": counts}
    assert total(combining.counted({"a": score}), combining.weights(0)) == 10 * counts


@pytest.mark.parametrize(("form", "counts"), [(1.0, 5.0), (0.01, 5.0), (0.0, 0.0), (-1.0, 0.0), (None, 0.0)], ids=str)
def test_a_score_counts_only_where_the_required_one_is_above_zero(form: float | None, counts: float) -> None:
    combining = Combining({"correct": Terms(requires=["form"]), "form": Terms()})
    assert combining.counted({"correct": 5.0, "form": form}) == {"correct": counts, "form": form}


def test_what_does_not_apply_stays_so_whether_the_gate_is_open_or_not() -> None:
    combining = Combining({"correct": Terms(requires=["form"], clip=(0, 1)), "form": Terms()})
    for form in (1.0, 0.0, None):
        assert combining.counted({"correct": None, "form": form}) == {"correct": None, "form": form}


def test_every_required_reward_must_pass() -> None:
    combining = Combining({"a": Terms(requires=["b", "c"]), "b": Terms(), "c": Terms()})
    for b, c, counts in ((1.0, 1.0, 3.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)):
        assert combining.counted({"a": 3.0, "b": b, "c": c})["a"] == counts


def test_a_required_reward_is_clipped_before_it_is_asked() -> None:
    combining = Combining({"a": Terms(requires=["b"]), "b": Terms(clip=(-1.0, 0.0))})
    assert combining.counted({"a": 3.0, "b": 8.0}) == {"a": 0.0, "b": 0.0}


def test_gates_work_through_gates_whatever_the_order() -> None:
    """Without the form the answer does not count, and then neither does the bonus on the answer."""
    combining = Combining({"bonus": Terms(requires=["right"]), "right": Terms(requires=["form"]), "form": Terms()})
    assert combining.counted({"bonus": 1.0, "right": 1.0, "form": 1.0}) == {"bonus": 1.0, "right": 1.0, "form": 1.0}
    assert combining.counted({"bonus": 1.0, "right": 1.0, "form": 0.0}) == {"bonus": 0.0, "right": 0.0, "form": 0.0}


def test_a_penalty_behind_a_closed_gate_is_lifted_and_the_clip_does_not_bring_it_back() -> None:
    combining = Combining({"penalty": Terms(requires=["form"], clip=(-2.0, -1.0)), "form": Terms()})
    assert combining.counted({"penalty": -5.0, "form": 1.0})["penalty"] == -2.0
    assert combining.counted({"penalty": -5.0, "form": 0.0})["penalty"] == 0.0


def test_a_metric_may_be_required_and_counts_for_nothing_itself() -> None:
    combining = Combining({"m": Terms(0.0, metric=True), "a": Terms(2.0, requires=["m"])})
    assert combining.counted({"m": 1.0, "a": 1.0}) == {"a": 1.0}
    assert combining.counted({"m": 0.0, "a": 1.0}) == {"a": 0.0}


def test_the_total_sums_what_applies() -> None:
    assert total({"a": 0.5, "b": None, "c": -1.0}, {"a": 4.0, "b": 100.0, "c": 0.25}) == 1.75
    assert total({"a": None}, {"a": 1.0}) == 0.0


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_overrides_replace_field_by_field() -> None:
    own = {"a": Terms(2.0, requires=["b"], clip=(0, 1)), "b": Terms()}
    terms = Combining(own, {"a": {"weight": 3.0}}).terms["a"]
    assert (terms.weight, terms.requires, terms.clip) == (3.0, ["b"], (0, 1))
    terms = Combining(own, {"a": {"requires": [], "clip": (0, 5)}}).terms["a"]
    assert (terms.weight, terms.requires, terms.clip) == (2.0, [], (0, 5))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"a": {"requires": ["form"]}}, "^reward a requires form, but the rewards are a, b, m$"),
        ({"a": {"requires": ["a"]}}, "^reward a requires a: one of them must not"),
        (
            {"a": {"requires": ["b"]}, "b": {"requires": ["a"]}},
            "^reward (a requires b requires a|b requires a req.* b):",
        ),
        ({"c": {"weight": 1.0}}, "^weight, requires or clip for c, but the rewards are a, b, m$"),
        ({"a": {"requires": "b"}}, r"^reward a: requires='b': requires is a list of reward names"),
        ({"a": {"requires": None}}, "requires is a list of reward names"),
        ({"a": {"requires": [1]}}, "requires is a list of reward names"),
        ({"a": {"clip": (1, 0)}}, r"^reward a: clip=\(1, 0\): clip is the smallest and the largest score"),
        ({"a": {"clip": (0, 0)}}, "clip is the smallest"),
        ({"a": {"clip": (0, math.nan)}}, "clip is the smallest"),
        ({"a": {"clip": (0, 1, 2)}}, "clip is the smallest"),
        ({"a": {"weight": math.inf}}, "^reward a: weight=inf: weight is a finite number, or a list of"),
        ({"a": {"weight": "1"}}, "weight is a finite number"),
        ({"a": {"weight": True}}, "weight is a finite number"),
        ({"a": {"weight": []}}, "weight is a finite number"),
        ({"a": {"weight": [[0, 1.0, 2.0]]}}, r"is a list of \[step, weight\]"),
        ({"a": {"weight": [0, 1.0]}}, r"is a list of \[step, weight\]"),
        ({"a": {"weight": [[5, 1.0], [5, 2.0]]}}, "the steps of a weight must increase"),
        ({"a": {"weight": [[5, 1.0], [2, 2.0]]}}, "the steps of a weight must increase"),
        ({"m": {"weight": 1.0}}, "^reward m: a metric is no part of the reward"),
        ({"m": {"clip": (0, 1)}}, "^reward m: a metric is no part of the reward"),
        ({"m": {"requires": ["a"]}}, "^reward m: a metric is no part of the reward"),
    ],
)
def test_what_cannot_be_combined_is_refused_in_one_line(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message) as refused:
        Combining({"a": Terms(), "b": Terms(), "m": Terms(0.0, metric=True)}, terms)
    assert "\n" not in str(refused.value)
