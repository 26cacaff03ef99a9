"""The decorator changes nothing but a tag."""

from __future__ import annotations

import math
from typing import Any

import pytest

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards import reward
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
