"""The decorator changes nothing but a tag."""

from __future__ import annotations

import math
from typing import Any

import pytest

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards import metric, reward
from posttrain.rl.rewards.combining import Terms
from posttrain.rl.rewards.decorator import RewardTag, tag_of


def length(completion: str) -> float:
    return float(len(completion))


def test_the_same_function_comes_back_and_can_be_called() -> None:
    def own(completion: str) -> float:
        return float(len(completion))

    assert reward(own) is own and own("four") == 4.0
    assert reward(weight=2, name="n", style="trl")(own) is own and own("four") == 4.0
    assert tag_of(own) == RewardTag(2.0, "n", "trl")


def test_untagged_function_has_the_default_tag() -> None:
    assert tag_of(length) == RewardTag(1.0, None, None)


@pytest.mark.parametrize("weight", [math.nan, math.inf, True, "1"])
def test_weight_must_be_a_finite_number(weight: Any) -> None:
    with pytest.raises(RewardError, match="weight"):
        reward(weight=weight)


def test_unknown_style_is_refused() -> None:
    with pytest.raises(RewardError, match="posttrain, group, trl, verifiers"):
        reward(style="nobody")  # type: ignore[call-overload]


def test_weight_as_a_positional_argument_is_explained() -> None:
    with pytest.raises(RewardError, match=r"@reward\(weight=2\)"):
        reward(2.0)  # type: ignore[call-overload]


def test_bound_method_is_refused_with_a_remedy_and_works_when_tagged_in_its_class() -> None:
    class Grader:
        def plain(self, completion: str) -> float:
            return 0.0

        @reward(weight=0.5)
        def tagged(self, completion: str) -> float:
            return 0.0

    with pytest.raises(RewardError, match="in its class"):
        reward(weight=2)(Grader().plain)
    assert tag_of(Grader().tagged).weight == 0.5


def test_terms_of_the_reward() -> None:
    @reward(weight=[(0, 1.0), (50, 0.0)], requires=["form"], clip=(0, 1))
    def own(completion: str) -> float:
        return 1.0

    terms = tag_of(own).terms
    assert terms.weight_at(25) == 0.5 and terms.requires == ["form"] and terms.clip == (0, 1) and not terms.metric
    assert tag_of(metric(length)).terms == Terms(0.0, metric=True)


@pytest.mark.parametrize(
    "setting", [{"weight": [(1, 1.0), (0, 2.0)]}, {"weight": [1, 2]}, {"clip": (1, 0)}, {"requires": "form"}]
)
def test_terms_that_are_none_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=f"^@reward: {next(iter(setting))}="):
        reward(**setting)
