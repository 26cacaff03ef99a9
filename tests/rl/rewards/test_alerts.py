"""Each alert at its threshold and just below; once an episode; a resumed run goes on where it stood."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import pytest

from posttrain.rl.rewards.alerts import KINDS, WINDOW, Alerts

GROUPS, SIZE = 8, 5
"""40 completions a step."""


def healthy(**figures: Any) -> dict[str, Any]:
    """A step of one reward ``r`` with nothing to complain about, but for ``figures`` (``__`` stands for a slash)."""
    step = {
        "reward/mean": 0.5,
        "reward/r/mean": 0.5,
        "reward/r/std": 0.5,
        "reward/r/max": 1.0,
        "rollout/tied_groups": 0.25,
        "rollout/length_correlation": 0.1,
        "rollout/groups": float(GROUPS),
    }
    return step | {key.replace("__", "/"): value for key, value in figures.items()}


def watch(steps: Iterable[dict[str, Any]], alerts: Alerts | None = None) -> tuple[list[set[str]], list[list[str]]]:
    """Kinds that hold after each step, and the lines said."""
    alerts = alerts or Alerts(["r"], SIZE)
    kinds, lines = [], []
    for step in steps:
        figures, said = alerts.step(step)
        assert set(figures) == {f"alert/{kind}" for kind in KINDS} and set(figures.values()) <= {0.0, 1.0}
        kinds.append({key.removeprefix("alert/") for key, value in figures.items() if value})
        lines.append(said)
    return kinds, lines


PERFECT = healthy(reward__r__mean=1.0, reward__r__std=0.0)
ZERO = healthy(reward__r__mean=0.0, reward__r__std=0.0, reward__r__max=0.0)
TIED = healthy(rollout__tied_groups=0.9)
LONG = healthy(rollout__length_correlation=0.7)


def test_a_healthy_run_says_nothing() -> None:
    kinds, lines = watch([healthy()] * 50)
    assert kinds == [set()] * 50 and lines == [[]] * 50


def test_a_reward_that_everyone_earns_is_saturated_after_a_full_window() -> None:
    kinds, lines = watch([PERFECT] * (WINDOW + 3))
    assert kinds == [set()] * (WINDOW - 1) + [{"saturated"}] * 4
    assert [len(said) for said in lines] == [0] * (WINDOW - 1) + [1, 0, 0, 0]
    assert lines[WINDOW - 1][0].startswith(
        "reward r is saturated: every completion of the last 20 steps scored about 1."
    )


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({"reward__r__mean": 0.98, "reward__r__std": 0.01}, True),
        ({"reward__r__mean": 0.979}, False),
        ({"reward__r__std": 0.011}, False),
        ({"reward__r__mean": None, "reward__r__std": None, "reward__r__max": None}, False),
    ],
)
def test_one_step_below_the_bar_is_enough_not_to_be_saturated(change: dict[str, Any], holds: bool) -> None:
    kinds, _ = watch([healthy(), *[PERFECT] * (WINDOW - 1), PERFECT | healthy(**{**PERFECT_FIGURES, **change})])
    assert ("saturated" in kinds[-1]) is holds


PERFECT_FIGURES = {"reward__r__mean": 1.0, "reward__r__std": 0.0}


def test_what_is_constant_below_its_best_is_not_saturated() -> None:
    half = healthy(reward__r__mean=0.5, reward__r__std=0.0, reward__r__max=0.5)
    assert watch([healthy(), *[half] * 30])[0][-1] == set()
    assert watch([half] * 30)[0][-1] == {"saturated"}  # nothing better was ever seen


def test_a_penalty_that_nobody_earns_any_more_is_neither_saturated_nor_never_nonzero() -> None:
    earned = healthy(reward__r__mean=-0.5, reward__r__std=0.5, reward__r__max=0.0)
    assert watch([earned, *[ZERO] * 40])[0][-1] == set()


def test_ties_are_reported_after_five_steps_and_again_after_they_cleared() -> None:
    steps = [TIED] * 4 + [healthy(rollout__tied_groups=0.89)] + [TIED] * 6 + [healthy()] + [TIED] * 5
    kinds, lines = watch(steps)
    assert [index for index, held in enumerate(kinds) if held == {"tied_groups"}] == [9, 10, 16]
    assert [index for index, said in enumerate(lines) if said] == [9, 16]
    assert "90% or more of the groups earned equal rewards in each of the last 5 steps (mean reward 0.5)" in lines[9][0]


@pytest.mark.parametrize(("correlation", "word"), [(0.7, "longer"), (-0.7, "shorter")])
def test_length_and_reward_that_go_together_are_reported(correlation: float, word: str) -> None:
    kinds, lines = watch([healthy(rollout__length_correlation=correlation)] * WINDOW)
    assert kinds == [set()] * (WINDOW - 1) + [{"length"}]
    assert lines[-1][0].startswith(f"the {word} completions") and f"{correlation:+.2f}" in lines[-1][0]


def test_the_correlation_is_the_mean_of_the_window_and_of_what_could_be_measured() -> None:
    """Ten of 0.8 and ten of 0.6 make 0.7; with one of 0.5 in place of one 0.6 it is 0.695."""
    pair = [healthy(rollout__length_correlation=0.8), healthy(rollout__length_correlation=0.6)]
    assert watch(pair * 10)[0][-1] == {"length"}
    assert watch([healthy(rollout__length_correlation=0.5), *(pair * 10)[:-1]])[0][-1] == set()
    for blank in (None, math.nan):
        unknown = healthy(rollout__length_correlation=blank)
        assert watch([unknown] * 10 + [LONG] * 10)[0][-1] == {"length"}
        assert watch([unknown] * 11 + [LONG] * 9)[0][-1] == set(), "too few to judge by"


@pytest.mark.parametrize(
    "zero",
    [
        ZERO,
        {key: value for key, value in ZERO.items() if not key.startswith("reward/r/")},  # it never applied
        healthy(reward__r__counted=0.0),  # its gate never opened
    ],
)
def test_a_reward_that_is_zero_from_the_start_is_reported_until_it_is_not(zero: dict[str, Any]) -> None:
    kinds, lines = watch([*[zero] * (WINDOW + 1), healthy(), *[zero] * 30])
    assert kinds == [set()] * (WINDOW - 1) + [{"never_nonzero"}] * 2 + [set()] * 31
    assert lines[WINDOW - 1][0].startswith("reward r counted 0 for every completion of 20 steps")


def test_scores_that_cancel_out_are_not_zero() -> None:
    assert watch([healthy(reward__r__mean=0.0, reward__r__std=1.0)] * 30)[0][-1] == set()


def test_failures_count_over_the_window_against_five_in_a_hundred() -> None:
    """2 of 40 are 5%, and pass; 3 of 40 do not; after 19 clean steps 3 of 800 are nothing."""
    assert watch([healthy(reward__r__timeouts=1.0, reward__r__errors=1.0)] * 25)[0][-1] == set()
    kinds, lines = watch([healthy(reward__r__timeouts=1.0, reward__r__errors=2.0), *[healthy()] * 3])
    assert kinds == [{"failures"}, set(), set(), set()]
    assert "reward r failed on 8% of the completions of the last 1 steps (1 timeouts, 2 errors)" in lines[0][0]


def test_a_metric_that_fails_is_reported_though_it_counts_for_nothing() -> None:
    steps = [healthy(reward__m__errors=40.0), healthy(eval__reward__r__errors=40.0)]
    _, lines = watch(steps)
    assert [len(said) for said in lines] == [1, 0] and lines[0][0].startswith("reward m failed on 100%")


def test_two_rewards_have_episodes_of_their_own() -> None:
    alerts = Alerts(["r", "s"], SIZE)
    both = healthy(reward__r__errors=20.0, reward__s__timeouts=20.0)
    _, lines = watch([healthy(reward__r__errors=20.0), both, both], alerts)
    assert [[line.split()[1] for line in said] for said in lines] == [["r"], ["s"], []]


def test_a_resumed_run_knows_from_its_metrics_what_it_knew_before() -> None:
    """Every cut of a run gives the alerts and the lines of the whole; blanks come back from the file as null."""
    best = healthy(rollout__length_correlation=math.nan)
    steps = [best, *[PERFECT | {"rollout/tied_groups": 1.0}] * 24, healthy(), *[LONG] * 24, *[ZERO] * 10]
    kinds, lines = watch(steps)
    assert {kind for held in kinds for kind in held} == {"saturated", "tied_groups", "length"}
    written = [{"step": 0, "eval/pass@1": 0.5}]
    for cut, step in enumerate(steps):
        past = json.loads(json.dumps(written).replace("NaN", "null"))
        assert watch(steps[cut:], Alerts(["r"], SIZE, past)) == (kinds[cut:], lines[cut:])
        written.append({"step": cut + 1, **step})
