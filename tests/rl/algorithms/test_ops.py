"""Segment arithmetic by hand; KL estimators by exact enumeration; every way of dividing."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from posttrain.rl.algorithms import LossInputs
from posttrain.rl.algorithms.ops import KlEstimator, Tokens, aggregate, clipped_surrogate, kl_penalty, segment_ids

from .oracle import pack, samples

VOCABULARY = 11


def test_segment_ids_of_uneven_and_empty_sequences() -> None:
    assert segment_ids(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 5).tolist() == [0, 0, 2, 2, 2]


def test_segment_sums_and_means_count_only_loss_tokens() -> None:
    mask = torch.tensor([False, True, False, True, False, True])
    inputs = LossInputs(
        logprobs=torch.tensor([9.0, 1.0, 9.0, 3.0, 9.0, 5.0]),
        old_logprobs=torch.zeros(6),
        advantages=torch.zeros(6),
        loss_mask=mask,
        cu_seqlens=torch.tensor([0, 4, 6]),
        num_loss_tokens=3,
        num_sequences=2,
    )
    tokens = Tokens.of(inputs)
    values = torch.tensor([9.0, 1.0, math.nan, 3.0, math.inf, 5.0])
    assert tokens.sequence_sum(values).tolist() == [4.0, 5.0]
    assert tokens.sequence_mean(values).tolist() == [2.0, 5.0]
    assert tokens.spread(torch.tensor([7.0, 8.0])).tolist() == [7.0] * 4 + [8.0] * 2
    assert tokens.counts.tolist() == [2.0, 1.0]
    assert tokens.sum(values).item() == 9.0


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        # token losses 1, 2, 3 | 10 in a step of 8 tokens, 4 sequences, 2 micro-batches, budget 5
        ("sequence_mean", (2 + 10) / 4),
        ("token_mean", 16 / 8),
        ("sequence_sum", 16 / 4),
        ("max_tokens", 16 / 20),
        ("micro_batch_mean", 16 / 4 / 2),
    ],
)
def test_aggregations_by_hand(how: str, expected: float) -> None:
    rows = samples([3, 1], seed=0, holes=False)
    inputs = pack(rows, num_loss_tokens=8, num_sequences=4, num_micro_batches=2, max_tokens=5)
    loss = torch.full_like(inputs.logprobs, math.nan)
    loss[inputs.loss_mask] = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    assert aggregate(loss, Tokens.of(inputs), inputs, how).item() == pytest.approx(expected, rel=1e-14)


def test_dividing_by_an_unset_budget_is_refused() -> None:
    inputs = pack(samples([3], seed=0), max_tokens=0)
    with pytest.raises(ValueError, match="max_tokens"):
        aggregate(inputs.logprobs, Tokens.of(inputs), inputs, "max_tokens")


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"), [(1.5, 1, -1.2), (0.5, 1, -0.5), (1.5, -1, 1.5), (0.5, -1, 0.8), (9, -1, 3)]
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, expected: float) -> None:
    value = clipped_surrogate(torch.tensor(float(ratio)), torch.tensor(float(advantage)), 0.2, 0.2, dual_clip=3.0)
    assert value.item() == pytest.approx(expected)


def test_clipped_gradient_stops_only_on_the_side_that_is_clipped() -> None:
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    clipped_surrogate(ratio, advantages, 0.2, 0.2).sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [0.0, -1.0, 1.0, 0.0, -2.0]


def test_a_huge_log_ratio_gives_a_finite_loss_and_gradient() -> None:
    """exp(300) is infinite, and infinity times the clip's zero gradient would be NaN."""
    rows = samples([2], seed=1, holes=False)
    for advantage in (1.0, -1.0):
        rows[0].lp, rows[0].old, rows[0].advantage = [-0.1, -400.0], [-400.0, -0.1], advantage
        tokens = Tokens.of(inputs := pack(rows))
        loss = clipped_surrogate(tokens.log_ratio.exp(), tokens.advantages, 0.2, 0.2).sum()
        loss.backward()
        assert loss.isfinite()
        assert inputs.logprobs.grad is not None
        assert inputs.logprobs.grad.isfinite().all()


def policies() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, old, ref = torch.randn(3, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), old.log_softmax(0), ref.log_softmax(0)


def gradient_of(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def expected_gradient(estimator: KlEstimator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σ_x p(x)·∇estimate(x) by enumeration, and ∇KL(p‖ref), ∇KL(ref‖p) from their definitions; on-policy."""
    logits, _, ref = policies()
    logp = logits.log_softmax(0)
    ratio = (logp - logp.detach()).exp()
    surrogate = (logp.detach().exp() * kl_penalty(logp, ref, ratio, estimator)).sum()
    reverse = (logp.exp() * (logp - ref)).sum()
    forward = (ref.exp() * (ref - logp)).sum()
    return gradient_of(surrogate, logits), gradient_of(reverse, logits), gradient_of(forward, logits)


@pytest.mark.parametrize("estimator", ["k2", "k1_ratio", "k3_ratio"])
def test_expected_gradient_is_the_reverse_kls_by_enumeration(estimator: KlEstimator) -> None:
    got, reverse, _ = expected_gradient(estimator)
    torch.testing.assert_close(got, reverse, rtol=0, atol=1e-15)
    assert reverse.abs().max() > 0.05


def test_k1_as_a_loss_has_no_expected_gradient_by_enumeration() -> None:
    assert expected_gradient("k1")[0].abs().max() < 1e-16


def test_k3_as_a_loss_has_the_forward_kls_expected_gradient_by_enumeration() -> None:
    got, reverse, forward = expected_gradient("k3")
    torch.testing.assert_close(got, forward, rtol=0, atol=1e-15)
    assert (got - reverse).abs().max() > 0.01


@pytest.mark.parametrize("estimator", ["k1_ratio", "k3_ratio"])
def test_ratio_estimators_stay_unbiased_off_policy(estimator: KlEstimator) -> None:
    """Samples from another policy: the ratio carries both the value and the gradient."""
    logits, old, ref = policies()
    logp = logits.log_softmax(0)
    estimate = (old.exp() * kl_penalty(logp, ref, (logp - old).exp(), estimator)).sum()
    exact = (logp.exp() * (logp - ref)).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=1e-12)
    torch.testing.assert_close(gradient_of(estimate, logits), gradient_of(exact, logits), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", -math.log(2)),
        ("k2", math.log(2) ** 2 / 2),
        ("k3", 2 - math.log(2) - 1),
        ("k1_ratio", -3 * math.log(2)),
        ("k3_ratio", 3 * (1 - math.log(2))),
    ],
)
def test_estimates_by_hand_at_a_reference_twice_as_likely(estimator: KlEstimator, expected: float) -> None:
    logp = torch.tensor(math.log(0.25), dtype=torch.float64)
    ref = torch.tensor(math.log(0.5), dtype=torch.float64)
    value = kl_penalty(logp, ref, torch.tensor(3.0, dtype=torch.float64), estimator)
    assert value.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("estimator", get_args(KlEstimator))
def test_a_reference_logprob_of_minus_infinity_stays_finite(estimator: KlEstimator) -> None:
    logp = torch.tensor([-1.0], requires_grad=True)
    value = kl_penalty(logp, torch.tensor([-math.inf]), torch.ones(1), estimator)
    value.sum().backward()
    assert value.isfinite().all()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()
