"""Each loss against the independent loops of ``oracle`` and against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from posttrain.rl.algorithms import ALGORITHMS, Algorithm, LossInputs, parse

from .oracle import Sample, pack, samples, step_gradient, step_loss

NAMES = sorted(ALGORITHMS)
POLICY = [name for name in NAMES if name != "cross_entropy"]
STOP_GRADIENT = {"cispo", "vespo", "dppo", "gspo_token"}
LENGTHS = [1, 7, 2, 5, 1, 4]


def flat(rows: list[Sample], values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(
        [v for row, line in zip(rows, values, strict=True) for v in [0.0] * row.prompt + line], dtype=torch.float64
    )


def gradient(algorithm: Algorithm, inputs: LossInputs) -> torch.Tensor:
    return torch.autograd.grad(algorithm.loss(inputs).loss, inputs.logprobs)[0]


@pytest.mark.parametrize("drift", [0.02, 0.6])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_plain_loops_on_uneven_rows_with_holes(name: str, drift: float) -> None:
    rows = samples(LENGTHS, seed=3, drift=drift)
    inputs = pack(rows)
    lp = [row.lp for row in rows]
    assert parse(name).loss(inputs).loss.item() == pytest.approx(step_loss(name, rows, lp, lp), rel=1e-12)
    expected = flat(rows, step_gradient(name, rows))
    torch.testing.assert_close(gradient(parse(name), inputs), expected, rtol=1e-6, atol=1e-8)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in NAMES if n not in STOP_GRADIENT])
def test_gradcheck_through_logprobs_away_from_the_clip_kinks(name: str) -> None:
    rows = samples([3, 1, 4], seed=11)
    inputs = pack(rows, garbage=0.0)
    algorithm = parse(name)
    if name != "cross_entropy":
        algorithm = algorithm.model_copy(update={"kl_coef": 0.3, "entropy_coef": 0.1, "correction": parse_tis()})

    def loss(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return algorithm.loss(replace(inputs, logprobs=logprobs, entropy=entropy)).loss

    assert torch.autograd.gradcheck(loss, (inputs.logprobs, inputs.entropy), eps=1e-7, atol=1e-6)


def parse_tis():
    return parse({"name": "grpo", "correction": "tis"}).correction


@pytest.mark.parametrize("name", sorted(STOP_GRADIENT))
def test_gradcheck_of_stop_gradient_losses_where_their_weight_is_constant(name: str) -> None:
    """Capped weights, a saturated kernel, or tokens outside the region do not move with the logprobs."""
    rows = samples([3, 1, 4], seed=5, holes=False)
    for row in rows:
        row.advantage = abs(row.advantage)
        row.old = row.mu = [x - 4.0 for x in row.lp]  # ratio e^4: above CISPO's 5, DPPO's 20 and GSPO's upper clip
    inputs = pack(rows, garbage=0.0)
    fields = {"vespo": {"lambda_pos": 1e-12, "k_pos": 1e-12}, "dppo": {"delta": 1.0}}.get(name, {})
    algorithm = parse({"name": name, **fields})
    assert torch.autograd.gradcheck(
        lambda x: algorithm.loss(replace(inputs, logprobs=x)).loss, (inputs.logprobs,), eps=1e-6, atol=1e-7
    )
    zero = name == "gspo_token"
    assert (gradient(algorithm, inputs).abs().max() == 0) == zero


def two(ratios: list[float], advantage: float, p: float = 0.25) -> LossInputs:
    """One sequence: a masked prompt token, then tokens of probability p with these ratios to old and sampler."""
    lp = [math.log(p)] * len(ratios)
    old = [x - math.log(r) for x, r in zip(lp, ratios, strict=True)]
    return pack([Sample(1, [True] * len(lp), lp, old, old, lp, [1.0] * len(lp), advantage)], max_tokens=10)


LOG_QUARTER = math.log(0.25)
BY_HAND = [
    # ratios 2 and 0.5; A = 1: min(2, 1.2) and min(.5, .8)
    ("grpo", 1.0, -(1.2 + 0.5) / 2),
    # A = −1: −min(−2, −1.2) and −min(−.5, −.8)
    ("grpo", -1.0, (2 + 0.8) / 2),
    ("dapo", 1.0, -(1.28 + 0.5) / 2),
    ("dr_grpo", 1.0, -(1.2 + 0.5) / 10),
    ("bnpo", 1.0, -(1.2 + 0.5) / 2),
    # the geometric mean of 2 and 1/2 is 1
    ("gspo", 1.0, -1.0),
    ("gspo_token", -1.0, 1.0),
    ("luspo", 1.0, -2.0),
    # 2 is cut to e^.4, 1/2 stays: √(e^.4 / 2)
    ("gmpo", 1.0, -math.sqrt(math.exp(0.4) / 2)),
    # 2 stays, 1/2 is lifted to e^−.4
    ("gmpo", -1.0, math.sqrt(2 * math.exp(-0.4))),
    ("cispo", 1.0, -(2 + 0.5) / 2 * LOG_QUARTER),
    # W = 1, φ = 1
    ("vespo", 1.0, -LOG_QUARTER),
    # p = .25, q = .125 and .5: both inside for A > 0; for A < 0 the second moved by −.25 < −.2 and is out
    ("dppo", 1.0, -(2 + 0.5) / 2 * LOG_QUARTER),
    ("dppo", -1.0, 2 / 2 * LOG_QUARTER),
    ("sapo", 1.0, -(4 / (1 + math.exp(-1)) + 4 / (1 + math.exp(0.5))) / 2),
    ("sapo", -1.0, (4 / 1.05 / (1 + math.exp(-1.05)) + 4 / 1.05 / (1 + math.exp(0.525))) / 2),
    ("cross_entropy", 1.0, -LOG_QUARTER),
]


@pytest.mark.parametrize(("name", "advantage", "expected"), BY_HAND)
def test_numbers_worked_out_by_hand(name: str, advantage: float, expected: float) -> None:
    assert parse(name).loss(two([2.0, 0.5], advantage)).loss.item() == pytest.approx(expected, rel=1e-12)


def test_vespo_kernel_by_hand() -> None:
    inputs = two([2.0], 1.0)
    phi = math.exp(3) * 4 * math.exp(-6)
    assert parse("vespo").loss(inputs).loss.item() == pytest.approx(-phi * LOG_QUARTER)
    inputs = two([2.0], -1.0)
    phi = math.exp(2) * 8 * math.exp(-4)
    assert parse("vespo").loss(inputs).loss.item() == pytest.approx(phi * LOG_QUARTER)


def test_vespo_limits_hold_the_sequence_weight() -> None:
    """Ten ratios of e^±10: W would be e^±100; the floor is 1e-8 and the ceiling makes φ vanish."""
    low = parse("vespo").loss(two([math.exp(-10)] * 10, 1.0)).loss.item()
    assert low == pytest.approx(-math.exp(3) * 1e-16 * math.exp(-3e-8) * LOG_QUARTER)
    assert parse("vespo").loss(two([math.exp(10)] * 10, 1.0)).loss.item() == 0.0


@pytest.mark.parametrize("name", ["vespo", "dppo"])
def test_sampler_anchored_losses_use_old_logprobs_where_the_sampler_gave_none(name: str) -> None:
    inputs = pack(samples(LENGTHS, seed=2))
    assert inputs.rollout_logprobs is not None
    without = replace(inputs, rollout_logprobs=None, old_logprobs=inputs.rollout_logprobs)
    assert torch.equal(gradient(parse(name), inputs), gradient(parse(name), without))
    moved = replace(inputs, old_logprobs=inputs.old_logprobs - 0.3)
    assert torch.equal(gradient(parse(name), inputs), gradient(parse(name), moved))


def test_dual_clip_stops_the_loss_of_negative_advantages_at_c_times_a() -> None:
    dual = parse({"name": "grpo", "dual_clip": 3.0})
    assert dual.loss(two([5.0], -2.0)).loss.item() == pytest.approx(6.0)
    assert parse("grpo").loss(two([5.0], -2.0)).loss.item() == pytest.approx(10.0)
    assert gradient(dual, two([5.0], -2.0)).abs().max() == 0
    assert dual.loss(two([2.0], -2.0)).loss.item() == pytest.approx(4.0)
    assert dual.loss(two([5.0], 2.0)).loss.item() == pytest.approx(-2.4)


def test_gspo_token_has_gspos_value_and_gradient_for_one_advantage_a_sequence() -> None:
    rows = samples(LENGTHS, seed=8, drift=2e-4)
    a, b = pack(rows), pack(rows)
    gspo, token = parse("gspo").loss(a).loss, parse("gspo_token").loss(b).loss
    assert gspo.item() == pytest.approx(token.item(), rel=1e-14)
    ga, gb = gradient(parse("gspo"), a), gradient(parse("gspo_token"), b)
    torch.testing.assert_close(ga, gb, rtol=1e-12, atol=0)
    assert ga.abs().max() > 0.01


def test_gspo_token_differs_from_gspo_where_the_advantage_varies_inside_a_sequence() -> None:
    rows = samples([6], seed=8, drift=2e-4, holes=False)
    inputs = pack(rows)
    varied = replace(inputs, advantages=torch.linspace(0.5, 2, inputs.advantages.numel(), dtype=torch.float64))
    ga, gb = gradient(parse("gspo"), varied), gradient(parse("gspo_token"), varied)
    assert (ga - gb).abs().max() > 0.01
    assert ga.sum().item() == pytest.approx(gb.sum().item(), rel=1e-3)


@pytest.mark.parametrize("name", POLICY)
def test_on_policy_the_gradient_is_reinforce_and_the_ratio_exactly_one(name: str) -> None:
    """At ratio 1 every surrogate's gradient is −A at each token, up to the loss's own division."""
    rows = samples(LENGTHS, seed=4)
    for row in rows:
        row.old = row.mu = row.lp
    inputs = pack(rows)
    output = parse(name).loss(inputs)
    assert output.metrics["policy/ratio_mean"].value() == 1.0
    assert output.metrics["policy/ratio_max"].value() == 1.0
    n, b = inputs.num_loss_tokens, len(rows)
    for row, got in zip(rows, split(rows, gradient(parse(name), inputs)), strict=True):
        divisor = {"dr_grpo": 10 * b, "luspo": b}.get(name, n)
        if name in {"grpo", "gspo", "gspo_token", "sapo", "gmpo", "gdpo"}:
            divisor = b * row.n
        expected = [-row.advantage / divisor if keep else 0.0 for keep in row.mask]
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def split(rows: list[Sample], values: torch.Tensor) -> list[torch.Tensor]:
    parts = values.split([row.prompt + len(row.lp) for row in rows])
    return [part[row.prompt :] for row, part in zip(rows, parts, strict=True)]


@pytest.mark.parametrize(
    ("name", "ratio", "advantage", "low", "high"),
    [
        ("grpo", 2.0, 1.0, 0, 1),
        ("grpo", 2.0, -1.0, 0, 0),
        ("grpo", 0.5, -1.0, 1, 0),
        ("gspo", 1.01, 1.0, 0, 1),
        ("gmpo", 0.5, -1.0, 1, 0),
        ("cispo", 6.0, -1.0, 0, 1),
        ("dppo", 10.0, 1.0, 0, 1),
        ("sapo", 10.0, 1.0, 0, 0),
    ],
)
def test_clip_fractions_tell_the_side(name: str, ratio: float, advantage: float, low: int, high: int) -> None:
    metrics = parse(name).loss(two([ratio, 1.0, 1.0, 1.0] if name != "gspo" else [ratio], advantage)).metrics
    share = 1 if name == "gspo" else 0.25
    assert metrics["policy/clip_fraction_low"].value() == low * share
    assert metrics["policy/clip_fraction_high"].value() == high * share
    assert metrics["policy/clip_fraction"].value() == (low + high) * share
