"""Weights for a sampler that disagrees with the trainer, by hand and through the loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from posttrain.rl.algorithms import Correction, LossInputs, Tokens, parse
from posttrain.rl.algorithms.corrections import CORRECTIONS, parse_correction
from posttrain.rl.errors import ConfigError

from .oracle import Sample, pack, samples


def mismatch(ratios: list[list[float]], advantages: list[float] | None = None) -> LossInputs:
    """One sequence a list; π_old/μ of its tokens are these ratios, and π = π_old."""
    rows = []
    for line, advantage in zip(ratios, advantages or [1.0] * len(ratios), strict=True):
        old = [-1.0] * len(line)
        mu = [-1.0 - math.log(r) for r in line]
        rows.append(Sample(1, [True] * len(line), old, old, mu, old, old, advantage))
    return pack(rows)


def weights(spec: object, inputs: LossInputs) -> list[float]:
    correction = parse_correction(spec)
    assert isinstance(correction, Correction)
    return correction.weights(Tokens.of(inputs))[inputs.loss_mask].tolist()


RATIOS = [[0.25, 1.0, 4.0, 8.0], [1.5, 1.5]]
CASES = [
    ("tis", [0.25, 1, 2, 2, 1.5, 1.5]),
    ({"name": "tis", "cap": 6.0}, [0.25, 1, 4, 6, 1.5, 1.5]),
    # products 8 and 2.25, geometric means 8^(1/4) and 1.5
    ({"name": "tis", "level": "sequence"}, [2, 2, 2, 2, 2, 2]),
    ({"name": "tis", "level": "sequence", "cap": 9.0}, [8, 8, 8, 8, 2.25, 2.25]),
    ({"name": "tis", "level": "geometric"}, [8**0.25] * 4 + [1.5, 1.5]),
    ("mis", [0, 0, 0, 0, 2.25, 2.25]),
    ({"name": "mis", "low": 3.0, "high": 9.0}, [8, 8, 8, 8, 0, 0]),
    ({"name": "mis", "level": "token"}, [0.25, 1, 0, 0, 1.5, 1.5]),
    ({"name": "mis", "level": "token", "low": 0.5}, [0, 1, 0, 0, 1.5, 1.5]),
    ({"name": "mis", "level": "geometric", "high": 1.6}, [0, 0, 0, 0, 1.5, 1.5]),
    ("icepop", [0, 1, 4, 0, 1.5, 1.5]),
]


@pytest.mark.parametrize(("spec", "expected"), CASES)
def test_importance_weights_by_hand(spec: object, expected: list[float]) -> None:
    assert weights(spec, mismatch(RATIOS)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ratio", [0.5, 5.0])
def test_icepops_interval_is_closed(ratio: float) -> None:
    inputs = mismatch([[1.0]])
    exact = replace(inputs, rollout_logprobs=inputs.old_logprobs)
    assert weights({"name": "icepop", "low": 1.0, "high": 1.0}, exact) == [1.0]
    assert weights("icepop", mismatch([[ratio * (0.999 if ratio < 1 else 1.001)]])) == [0.0]
    assert weights("icepop", mismatch([[ratio * (1.001 if ratio < 1 else 0.999)]])) != [0.0]


def test_opsm_drops_only_negative_sequences_that_drifted() -> None:
    """Mean log μ − log π: ln 2 = 0.69 above the 0.5 of the default, ln 1.5 = 0.41 below."""
    ratios, advantages = [[0.5, 0.5], [0.5, 0.5], [1 / 1.5], [0.25, 1.0]], [-1.0, 1.0, -1.0, -1.0]
    inputs = mismatch(ratios, advantages)
    assert weights("opsm", inputs) == [0, 0, 1, 1, 1, 0, 0]
    assert weights({"name": "opsm", "delta": 0.7}, inputs) == [1] * 7


def test_opsm_looks_at_the_policy_now_not_at_the_old_one() -> None:
    inputs = mismatch([[1.0, 1.0]], [-1.0])
    moved = replace(inputs, logprobs=(inputs.logprobs - 0.6).detach())
    assert weights("opsm", inputs) == [1, 1]
    assert weights("opsm", moved) == [0, 0]


@pytest.mark.parametrize("spec", [*CORRECTIONS, {"name": "tis", "level": "sequence"}])
def test_masked_positions_do_not_enter_a_sequences_ratio(spec: object) -> None:
    rows = samples([6, 3, 4], seed=6)
    clean = weights(spec, pack(rows, garbage=0.0))
    assert weights(spec, pack(rows, garbage=math.nan)) == clean
    assert weights(spec, pack(rows, garbage=-math.inf)) == clean
    assert any(not keep for row in rows for keep in row.mask)


def test_a_very_long_sequence_does_not_overflow_the_product() -> None:
    inputs = mismatch([[1.5] * 400, [1 / 1.5] * 400])
    sequence = weights({"name": "tis", "level": "sequence", "cap": 1e12}, inputs)
    assert sequence[0] == pytest.approx(math.exp(20))
    assert sequence[-1] == pytest.approx(math.exp(-20))
    geometric = weights({"name": "tis", "level": "geometric"}, inputs)
    assert geometric[0] == pytest.approx(1.5)


def test_the_correction_multiplies_each_tokens_loss_and_leaves_the_denominator() -> None:
    """Ratios .25, 1, 4, 8 under IcePop: the tokens at 1 and 4 stay, divided by all six."""
    inputs = mismatch(RATIOS)
    output = parse({"name": "dapo", "correction": "icepop"}).loss(inputs)
    assert output.loss.item() == pytest.approx(-(1 + 4 + 1.5 + 1.5) / 6)
    grad = torch.autograd.grad(output.loss, inputs.logprobs)[0][inputs.loss_mask]
    assert grad.tolist() == pytest.approx([-w / 6 for w in (0, 1, 4, 0, 1.5, 1.5)])
    assert output.metrics["policy/correction_kept"].value() == pytest.approx(4 / 6)
    assert output.metrics["policy/correction_weight"].value() == pytest.approx(8 / 6)


def test_kl_and_entropy_terms_are_not_weighed() -> None:
    inputs = mismatch([[8.0, 8.0]])
    inputs = replace(inputs, ref_logprobs=inputs.ref_logprobs - 0.5)  # type: ignore[operator]
    spec = {"kl_coef": 0.5, "entropy_coef": 0.25, "correction": "icepop"}
    kl = math.exp(-0.5) + 0.5 - 1
    assert parse({"name": "grpo", **spec}).loss(inputs).loss.item() == pytest.approx(0.5 * kl - 0.25 * -1.0)


def test_correction_without_the_samplers_logprobs_says_what_is_missing() -> None:
    inputs = replace(mismatch([[1.0]]), rollout_logprobs=None)
    with pytest.raises(ValueError, match=r"correction tis needs .*rollout_logprobs"):
        parse({"name": "grpo", "correction": "tis"}).loss(inputs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tiss", "unknown correction 'tiss'; known: tis, mis, icepop, opsm"),
        ({"level": "token"}, "unknown correction None; known: tis, mis, icepop, opsm"),
        ({"name": "tis", "cp": 2}, "tis has no cp; known: name, level, cap"),
        ({"name": "mis", "low": 4.0}, "low must be below high"),
    ],
)
def test_wrong_corrections_are_refused_in_one_line(spec: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse({"name": "grpo", "correction": spec})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vespo", "dppo"])
def test_losses_anchored_at_the_sampler_refuse_a_second_ratio(name: str) -> None:
    with pytest.raises(ConfigError, match="already weighs by the ratio to the sampler"):
        parse({"name": name, "correction": "tis"})
    assert parse({"name": name, "correction": "opsm"}).needs_rollout_logprobs


class Halve(Correction):
    name: str = "halve"

    def weights(self, tokens: Tokens) -> torch.Tensor:
        return torch.full_like(tokens.logprobs, 0.5)


def test_a_correction_of_the_users_own_is_passed_as_an_instance() -> None:
    inputs = mismatch([[1.0, 1.0]])
    plain, halved = parse("grpo"), parse({"name": "grpo", "correction": Halve()})
    assert halved.loss(inputs).loss.item() == pytest.approx(plain.loss(inputs).loss.item() / 2)
