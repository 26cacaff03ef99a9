"""The template every policy-gradient loss goes through: masks, empty batches, terms, metrics, switches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from posttrain.rl.algorithms import (
    ALGORITHMS,
    ClippedPolicyGradient,
    LossInputs,
    PolicyGradient,
    Surrogate,
    Tokens,
    parse,
)

from .oracle import Sample, pack, samples

NAMES = sorted(ALGORITHMS)
POLICY = [name for name in NAMES if name != "cross_entropy"]
EVERYTHING = {"kl_coef": 0.3, "entropy_coef": 0.1, "top_entropy": 0.5}


def full(name: str) -> PolicyGradient:
    """The algorithm with every optional term switched on."""
    correction = "opsm" if name in ("vespo", "dppo") else "tis"
    algorithm = parse({"name": name, **EVERYTHING, "correction": correction})
    assert isinstance(algorithm, PolicyGradient)
    return algorithm


def run(algorithm: object, inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    loss = algorithm.loss(inputs).loss  # type: ignore[attr-defined]
    grads = torch.autograd.grad(loss, [inputs.logprobs, inputs.entropy], allow_unused=True)
    return loss.detach(), grads[0], grads[1]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", POLICY)
def test_nan_or_infinity_at_masked_positions_reaches_neither_value_nor_gradient(name: str, garbage: float) -> None:
    rows = samples([5, 1, 6], seed=9)
    clean, dirty = (replace(pack(rows, garbage=g), entropy_threshold=0.8) for g in (0.0, garbage))
    for ours, theirs in zip(run(full(name), dirty), run(full(name), clean), strict=True):
        assert ours is not None
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_an_all_masked_batch_is_zero_with_zero_gradient(name: str) -> None:
    rows = samples([5, 1], seed=9)
    for row in rows:
        row.mask = [False] * len(row.mask)
    inputs = replace(pack(rows), entropy_threshold=0.0)
    algorithm = parse(name) if name == "cross_entropy" else full(name)
    loss, grad, _ = run(algorithm, inputs)
    assert loss.item() == 0.0
    assert grad.tolist() == [0.0] * grad.numel()


@pytest.mark.parametrize("name", NAMES)
def test_a_fully_masked_row_beside_others_changes_nothing(name: str) -> None:
    rows = samples([5, 3, 6], seed=9)
    rows[1].mask = [False] * 3
    algorithm = parse(name) if name == "cross_entropy" else full(name)
    with_row, without = (replace(pack(r), entropy_threshold=0.8) for r in (rows, [rows[0], rows[2]]))
    a, b = run(algorithm, with_row), run(algorithm, without)
    assert a[0].item() == pytest.approx(b[0].item(), rel=1e-14)
    kept = torch.ones(a[1].numel(), dtype=torch.bool)
    bounds = with_row.cu_seqlens.tolist()
    kept[bounds[1] : bounds[2]] = False
    torch.testing.assert_close(a[1][kept], b[1], rtol=1e-13, atol=0)
    assert a[1][~kept].abs().max() == 0


@pytest.mark.parametrize("name", POLICY)
def test_fp32_inputs_give_an_fp32_gradient_close_to_fp64(name: str) -> None:
    inputs = pack(samples([5, 2, 6], seed=12))
    single = replace(
        inputs,
        **{
            field: getattr(inputs, field).detach().float()
            for field in ("old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")
        },
        logprobs=inputs.logprobs.detach().float().requires_grad_(),
    )
    expected = torch.autograd.grad(parse(name).loss(inputs).loss, inputs.logprobs)[0]
    got = torch.autograd.grad(parse(name).loss(single).loss, single.logprobs)[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def one(lp: list[float], ref: list[float], entropy: list[float], advantage: float = 0.0) -> LossInputs:
    return pack([Sample(1, [True] * len(lp), lp, lp, lp, ref, entropy, advantage)])


@pytest.mark.parametrize(
    ("estimator", "first", "gradient"),
    [
        # d = ref − lp = .5; ratio 1 with gradient 1
        ("k1", -0.5, 1.0),
        ("k2", 0.125, -0.5),
        ("k3", math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
        ("k1_ratio", -0.5, 1 - 0.5),
        ("k3_ratio", math.exp(0.5) - 1.5, 1 - math.exp(0.5) + math.exp(0.5) - 1.5),
    ],
)
def test_kl_term_by_hand(estimator: str, first: float, gradient: float) -> None:
    inputs = one([-2.0, -1.0], [-1.5, -1.0], [1.0, 1.0])
    algorithm = parse({"name": "dapo", "kl_coef": 0.1, "kl_estimator": estimator})
    loss, grad, _ = run(algorithm, inputs)
    assert loss.item() == pytest.approx(0.1 * first / 2, rel=1e-12)
    assert grad[1].item() == pytest.approx(0.1 * gradient / 2, rel=1e-12)


def test_the_default_estimator_is_k3_ratio() -> None:
    assert full("grpo").kl_estimator == "k3_ratio"


def test_entropy_bonus_by_hand() -> None:
    inputs = one([-1.0, -1.0], [-1.0, -1.0], [0.5, 2.0])
    loss, _, grad = run(parse({"name": "grpo", "entropy_coef": 0.01}), inputs)
    assert loss.item() == pytest.approx(-0.0125)
    assert grad is not None
    assert grad.tolist() == [0.0, -0.005, -0.005]


def test_top_entropy_keeps_tokens_at_or_above_the_threshold_and_divides_by_all() -> None:
    inputs = replace(one([-1.0] * 4, [-1.0] * 4, [0.1, 2.0, 0.9, 1.0], advantage=1.0), entropy_threshold=1.0)
    loss, grad, _ = run(parse({"name": "dapo", "top_entropy": 0.5}), inputs)
    assert loss.item() == pytest.approx(-2 / 4)
    assert grad.tolist() == [0.0, 0.0, -0.25, 0.0, -0.25]
    assert parse({"name": "dapo", "top_entropy": 0.2}).entropy_quantile == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("spec", "missing"),
    [
        ({"kl_coef": 0.1}, "ref_logprobs"),
        ({"entropy_coef": 0.1}, "entropy"),
        ({"top_entropy": 0.2}, "entropy"),
        ({"correction": "mis"}, "rollout_logprobs"),
    ],
)
def test_a_missing_input_is_named(spec: dict, missing: str) -> None:
    inputs = replace(one([-1.0], [-1.0], [1.0]), ref_logprobs=None, rollout_logprobs=None, entropy=None)
    with pytest.raises(ValueError, match=f"LossInputs.{missing}, which is missing"):
        parse({"name": "grpo", **spec}).loss(inputs)


def test_top_entropy_without_a_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="entropy_threshold"):
        parse({"name": "grpo", "top_entropy": 0.2}).loss(one([-1.0], [-1.0], [1.0]))


def test_metrics_by_hand() -> None:
    lp, old, mu, ref = [-1.0, -2.0], [-1.5, -2.0], [-1.5, -2.25], [-1.0, -1.0]
    row = Sample(2, [True, True], lp, old, mu, ref, [0.5, 1.5], 1.0)
    metrics = {k: m.value() for k, m in parse("grpo").loss(pack([row])).metrics.items()}
    ratio = math.exp(0.5)
    assert metrics["loss/total"] == pytest.approx(-(1.2 + 1) / 2)
    assert metrics["policy/ratio_mean"] == pytest.approx((ratio + 1) / 2)
    assert metrics["policy/ratio_max"] == pytest.approx(ratio)
    assert metrics["policy/clip_fraction_high"] == 0.5
    assert metrics["policy/clip_fraction_low"] == 0.0
    assert metrics["policy/entropy"] == 1.0
    # log π_old − log μ: 0 and .25; ref − π: 0 and 1
    assert metrics["policy/kl_sampler"] == pytest.approx((math.exp(0.25) - 1.25) / 2)
    assert metrics["policy/sampler_gap"] == 0.125
    assert metrics["policy/kl_ref"] == pytest.approx((math.e - 2) / 2)
    assert set(metrics) == {
        "loss/total",
        "policy/ratio_mean",
        "policy/ratio_max",
        "policy/clip_fraction",
        "policy/clip_fraction_low",
        "policy/clip_fraction_high",
        "policy/entropy",
        "policy/kl_sampler",
        "policy/sampler_gap",
        "policy/kl_ref",
    }


def test_metrics_hold_no_graph_and_merge_over_micro_batches_as_one_batch() -> None:
    from posttrain.rl.metrics import merge, values

    rows = samples([4, 7, 2, 5], seed=15)
    counts = {"num_loss_tokens": sum(row.n for row in rows), "num_sequences": 4}
    whole = parse("grpo").loss(pack(rows)).metrics
    parts = [parse("grpo").loss(pack([row], **counts)).metrics for row in rows]
    assert values(merge(parts)) == pytest.approx(values(whole), rel=1e-12)
    for metric in whole.values():
        for part in (getattr(metric, name) for name in metric.__slots__):
            assert not getattr(part, "requires_grad", False)


def test_soft_overlong_punishment_is_daposs_equation_13() -> None:
    """Lmax 20480, Lc 4096: nothing to 16384, half way −.5, −1 at and beyond the end."""
    dapo = parse("dapo")
    lengths = [1, 16384, 18432, 20480, 30000]
    assert [dapo.length_penalty(n, 20480) for n in lengths] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert parse({"name": "dapo", "overlong_penalty": 0.5}).length_penalty(20480, 20480) == -0.5
    assert parse({"name": "dapo", "overlong_buffer": 0.0}).length_penalty(20480, 20480) == 0.0
    assert parse("grpo").length_penalty(20480, 20480) == 0.0


def test_what_each_option_asks_of_the_loop() -> None:
    grpo = parse("grpo")
    assert grpo.needs_groups
    assert not (grpo.needs_reference or grpo.needs_rollout_logprobs or grpo.needs_entropy_gradient)
    assert not (grpo.drops_equal_groups or grpo.drops_truncated)
    assert grpo.entropy_quantile is None
    assert parse({"name": "grpo", "kl_coef": 0.1}).needs_reference
    assert parse({"name": "grpo", "entropy_coef": -0.1}).needs_entropy_gradient
    assert parse({"name": "grpo", "correction": "opsm"}).needs_rollout_logprobs
    assert parse({"name": "grpo", "overlong_filter": True}).drops_truncated
    assert parse("dapo").drops_equal_groups
    assert parse("vespo").needs_rollout_logprobs
    assert not parse("reinforce_pp").needs_groups
    assert not parse("cross_entropy").needs_groups


class Squared(PolicyGradient):
    """A user's own loss: −ratio²·A."""

    name: Literal["squared"] = "squared"
    scale: float = 2.0

    def surrogate(self, tokens: Tokens) -> Surrogate:
        ratio = tokens.log_ratio.exp()
        return Surrogate(-self.scale * ratio.square() * tokens.advantages, ratio)


class OnlyRatio(ClippedPolicyGradient):
    """A user's own ratio inside the clipped loss."""

    name: Literal["only_ratio"] = "only_ratio"

    def ratio(self, tokens: Tokens) -> torch.Tensor:
        return (2 * tokens.log_ratio).exp()


def test_an_algorithm_of_the_users_own() -> None:
    row = Sample(1, [True], [-1.0], [-1.05], [-1.0], [-1.0], [1.0], 1.5)
    loss, grad, _ = run(Squared(scale=3.0), pack([row]))
    assert loss.item() == pytest.approx(-3 * 1.5 * math.exp(0.1))
    assert grad[1].item() == pytest.approx(-3 * 1.5 * 2 * math.exp(0.1))
    assert run(OnlyRatio(), pack([row]))[0].item() == pytest.approx(-1.5 * math.exp(0.1))
    assert run(OnlyRatio(clip_high=0.01), pack([row]))[0].item() == pytest.approx(-1.5 * 1.01)
    assert Squared(kl_coef=0.1).needs_reference
