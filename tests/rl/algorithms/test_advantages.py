"""Every estimator against plain loops over groups, and the cases that went wrong elsewhere."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from posttrain.rl.algorithms import AdvantageInputs, parse
from posttrain.rl.algorithms.advantages import ADVANTAGES
from posttrain.rl.errors import ConfigError

NAMES = sorted(ADVANTAGES)
GROUPED = [name for name in NAMES if name != "reinforce_pp"]
EPSILON = 1e-6


def inputs(
    rewards: list[float],
    groups: list[int],
    lengths: list[int] | None = None,
    components: list[list[float]] | None = None,
    weights: list[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> AdvantageInputs:
    components = components or [[r] for r in rewards]
    return AdvantageInputs(
        rewards=torch.tensor(rewards, dtype=dtype),
        group_ids=torch.tensor(groups),
        lengths=torch.tensor(lengths or [5] * len(rewards)),
        components=torch.tensor(components, dtype=dtype),
        weights=torch.tensor(weights or [1.0] * len(components[0]), dtype=dtype),
    )


def estimate(name: str, *args: object, **kwargs: object) -> list[float]:
    return ADVANTAGES[name](inputs(*args, **kwargs), EPSILON).tolist()  # type: ignore[arg-type]


def z(values: list[float]) -> list[float]:
    if len(set(values)) < 2:
        return [0.0] * len(values)
    mean, std = statistics.fmean(values), statistics.stdev(values)
    return [(v - mean) / (std + EPSILON) for v in values]


def token_z(values: list[float], lengths: list[int]) -> list[float]:
    """z over the list in which each value stands once a token."""
    tokens = [v for v, n in zip(values, lengths, strict=True) for _ in range(n)]
    mean, std = statistics.fmean(tokens), statistics.stdev(tokens)
    return [(v - mean) / (std + EPSILON) for v in values]


def plain(name: str, rewards: list[float], groups: list[int], lengths: list[int], parts: list[list[float]]) -> list:
    """The estimators one group at a time, from the papers."""
    result = [0.0] * len(rewards)
    if name == "reinforce_pp":
        return token_z(rewards, lengths)
    for g in sorted(set(groups)):
        members = [i for i, other in enumerate(groups) if other == g]
        r = [rewards[i] for i in members]
        n = [lengths[i] for i in members]
        for place, i in enumerate(members):
            others = r[:place] + r[place + 1 :]
            if not others:
                continue
            if name == "group":
                result[i] = z(r)[place]
            elif name in ("group_mean", "reinforce_pp_baseline"):
                result[i] = r[place] - statistics.fmean(r)
            elif name == "rloo":
                result[i] = r[place] - statistics.fmean(others)
            elif name == "opo":
                result[i] = r[place] - sum(a * b for a, b in zip(n, r, strict=True)) / sum(n)
            elif name == "maxrl":
                result[i] = (r[place] - statistics.fmean(r)) / (statistics.fmean(r) + EPSILON)
            elif name == "gdpo":
                weights = [1.0, 0.5]
                result[i] = sum(w * z([parts[j][k] for j in members])[place] for k, w in enumerate(weights))
    if name == "gdpo":
        return z(result)
    return token_z(result, lengths) if name == "reinforce_pp_baseline" else result


@pytest.mark.parametrize("name", NAMES)
def test_uneven_interleaved_groups_equal_the_plain_loops(name: str) -> None:
    rng = random.Random(1)
    groups = [7, 3, 7, 3, 3, 9, 9, 7, 3, 9, 9]  # 3, 4 and 4 members, not adjacent
    lengths = [rng.randrange(1, 30) for _ in groups]
    parts = [[rng.random(), rng.choice([0.0, 1.0])] for _ in groups]
    rewards = [a + 0.5 * b for a, b in parts]
    got = estimate(name, rewards, groups, lengths, parts, [1.0, 0.5])
    assert got == pytest.approx(plain(name, rewards, groups, lengths, parts), rel=1e-12, abs=1e-14)


BY_HAND = [
    # rewards 1, 0, 0, 0: mean 1/4, unbiased variance (9/16 + 3/16)/3 = 1/4
    ("group", [0.75 / 0.500001, *[-0.25 / 0.500001] * 3]),
    ("group_mean", [0.75, -0.25, -0.25, -0.25]),
    ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),
    # lengths 2, 4, 6, 8: baseline 2/20
    ("opo", [0.9, -0.1, -0.1, -0.1]),
    ("maxrl", [0.75 / 0.250001, *[-0.25 / 0.250001] * 3]),
    # 20 tokens of which 2 are worth 1: mean .1, unbiased variance (2·.81 + 18·.01)/19
    ("reinforce_pp", [0.9 / (math.sqrt(1.8 / 19) + 1e-6), *[-0.1 / (math.sqrt(1.8 / 19) + 1e-6)] * 3]),
]


@pytest.mark.parametrize(("name", "expected"), BY_HAND)
def test_one_success_in_four_by_hand(name: str, expected: list[float]) -> None:
    assert estimate(name, [1.0, 0.0, 0.0, 0.0], [0] * 4, [2, 4, 6, 8]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_give_exactly_zero(name: str, dtype: torch.dtype) -> None:
    """0.1 summed 7 times is not 0.7: rounding over an epsilon of 1e-6 would be trained on."""
    assert estimate(name, [0.1] * 7, [0] * 7, [1, 9, 2, 4, 7, 3, 5], dtype=dtype) == [0.0] * 7


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_of_one_has_advantage_zero(name: str) -> None:
    got = estimate(name, [1.0, 0.3, 0.9], [0, 1, 1])
    assert got[0] == 0.0
    assert got[1] < 0 < got[2]


def test_reinforce_pp_needs_no_groups() -> None:
    got = estimate("reinforce_pp", [1.0, 0.0], [0, 1], [1, 1])
    assert got == pytest.approx([0.5 / (math.sqrt(0.5) + 1e-6), -0.5 / (math.sqrt(0.5) + 1e-6)])


@pytest.mark.parametrize("name", [n for n in GROUPED if n not in ("gdpo", "reinforce_pp_baseline")])
def test_groups_of_different_prompts_do_not_mix(name: str) -> None:
    """A group's advantages do not depend on what else is in the batch, or in which order."""
    alone = estimate(name, [1.0, 0.0, 0.5], [4, 4, 4], [2, 3, 4])
    mixed = estimate(name, [9.0, 1.0, 0.0, 3.0, 0.5], [1, 4, 4, 1, 4], [5, 2, 3, 5, 4])
    assert [mixed[i] for i in (1, 2, 4)] == alone


@pytest.mark.parametrize("name", NAMES)
def test_a_completion_without_a_reward_has_advantage_zero_and_no_influence(name: str) -> None:
    got = estimate(name, [1.0, math.nan, 0.0, 0.5], [0] * 4, [2, 3, 4, 5])
    assert got[1] == 0.0
    assert [got[i] for i in (0, 2, 3)] == pytest.approx(estimate(name, [1.0, 0.0, 0.5], [0] * 3, [2, 4, 5]))


def test_gdpo_keeps_a_small_reward_from_drowning() -> None:
    """Sums 10, 11, 0, 1: standardised as a whole, the second reward moves almost nothing; by itself it counts fully."""
    parts = [[10.0, 0.0], [10.0, 1.0], [0.0, 0.0], [0.0, 1.0]]
    got = estimate("gdpo", [sum(p) for p in parts], [0] * 4, None, parts, [1.0, 1.0])
    assert got[0] == pytest.approx(0, abs=1e-4)
    assert got[3] == pytest.approx(0, abs=1e-4)
    assert got[1] == pytest.approx(-got[2])
    assert got[1] == pytest.approx(math.sqrt(1.5), rel=1e-4)


def test_gdpo_leaves_out_a_component_that_does_not_apply() -> None:
    """The second reward scores only two of four: z over those two is ±1/√2, and 0 for the others."""
    nan = math.nan
    parts = [[1.0, nan], [0.0, nan], [0.0, 2.0], [1.0, 4.0]]
    got = estimate("gdpo", [1.0, 0.0, 2.0, 5.0], [0] * 4, None, parts, [1.0, 1.0])
    first, second = 0.5 / (math.sqrt(1 / 3) + 1e-6), 1 / (math.sqrt(2) + 1e-6)
    assert got == pytest.approx(z([first, -first, -first - second, first + second]), rel=1e-12)


def test_gdpo_uses_the_weights() -> None:
    parts = [[1.0, 0.0], [0.0, 1.0]]
    assert estimate("gdpo", [2.0, 1.0], [0, 0], None, parts, [2.0, 1.0])[0] > 0
    assert estimate("gdpo", [1.0, 2.0], [0, 0], None, parts, [1.0, 2.0])[0] < 0


def test_gdpo_without_components_is_refused() -> None:
    bare = AdvantageInputs(torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="components"):
        parse("gdpo").advantages(bare)


def test_maxrl_refuses_a_negative_mean() -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        estimate("maxrl", [-1.0, 0.5], [0, 0])


@pytest.mark.parametrize("name", ["maxrl", "group"])
def test_a_group_that_never_succeeds_gives_zero(name: str) -> None:
    assert estimate(name, [0.0] * 4, [0] * 4) == [0.0] * 4


def test_tokenless_completions_weigh_nothing_where_lengths_count() -> None:
    """The overlong filter leaves a completion without loss tokens: OPO's baseline is then the other's reward."""
    assert estimate("opo", [1.0, 0.0], [0, 0], [0, 4]) == [1.0, 0.0]
    assert estimate("opo", [1.0, 0.5], [0, 0], [0, 0]) == [1.0, 0.5]


def test_the_epsilon_is_a_field() -> None:
    batch = inputs([1.0, 0.0], [0, 0])
    for epsilon in (1e-4, 1.0):
        got = parse({"name": "grpo", "std_epsilon": epsilon}).advantages(batch).tolist()
        assert got == pytest.approx([0.5 / (math.sqrt(0.5) + epsilon), -0.5 / (math.sqrt(0.5) + epsilon)], rel=1e-12)


def test_cross_entropy_weighs_every_completion_one() -> None:
    assert parse("cross_entropy").advantages(inputs([3.0, -1.0], [0, 0])).tolist() == [1.0, 1.0]


PRESETS = {
    "grpo": "group",
    "dapo": "group",
    "dr_grpo": "group_mean",
    "rloo": "rloo",
    "reinforce_pp": "reinforce_pp",
    "reinforce_pp_baseline": "reinforce_pp_baseline",
    "opo": "opo",
    "maxrl": "maxrl",
    "gdpo": "gdpo",
}


@pytest.mark.parametrize(("preset", "estimator"), PRESETS.items())
def test_each_preset_uses_its_estimator(preset: str, estimator: str) -> None:
    rewards, groups, lengths = [1.0, 0.0, 0.25, 0.5, 0.75], [0, 0, 0, 1, 1], [3, 9, 4, 2, 8]
    batch = inputs(rewards, groups, lengths)
    expected = plain(estimator, rewards, groups, lengths, [[r, 0.0] for r in rewards])
    assert parse(preset).advantages(batch).tolist() == pytest.approx(expected, rel=1e-12)
