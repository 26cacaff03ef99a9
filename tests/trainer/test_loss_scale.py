"""The scale of float16 losses, on numbers that overflow and underflow by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from posttrain.trainer.loss_scale import FIRST, GROWTH_AFTER, SMALLEST, LossScale


def backward_of(weight: nn.Parameter, slope: float, calls: list[float]):
    """A backward pass through float16: whatever exceeds 65,504 on the way is infinite."""

    def run(scale: float) -> str:
        calls.append(scale)
        weight.grad = torch.tensor([slope * scale]).half().float()
        return f"ran at {scale:g}"

    return run


def test_an_overflow_is_run_again_at_a_smaller_scale_and_adds_to_what_was_there() -> None:
    weight, scale, calls = nn.Parameter(torch.zeros(1)), LossScale(), []
    weight.grad = torch.tensor([3.0])
    assert scale.backward([weight], backward_of(weight, 500.0, calls)) == "ran at 64"
    assert calls == [4096.0, 512.0, 64.0], "500 · 512 is beyond 65,504, 500 · 64 is not"
    assert weight.grad.item() == 503.0
    assert scale.backward([weight], backward_of(weight, 500.0, calls)) == "ran at 64", "it is remembered"
    assert weight.grad.item() == 1003.0


def test_what_underflows_without_a_scale_is_kept() -> None:
    weight, slope = nn.Parameter(torch.zeros(1)), 2.0**-30
    assert torch.tensor([slope]).half().item() == 0.0
    LossScale().backward([weight], backward_of(weight, slope, []))
    assert weight.grad.item() == slope


def test_the_scale_grows_back_after_quiet_micro_batches() -> None:
    weight, scale, calls = nn.Parameter(torch.zeros(1)), LossScale(), []
    scale.backward([weight], backward_of(weight, 100.0, calls))
    assert scale.value == FIRST / 8
    for _ in range(GROWTH_AFTER - 1):
        scale.backward([weight], backward_of(weight, 0.001, calls))
    assert scale.value == FIRST


@pytest.mark.parametrize("slope", [math.nan, math.inf])
def test_a_gradient_that_is_never_finite_is_left_for_the_optimizer_to_name(slope: float) -> None:
    weight, scale, calls = nn.Parameter(torch.zeros(1)), LossScale(), []
    scale.backward([weight], backward_of(weight, slope, calls))
    assert not torch.isfinite(weight.grad).any() and calls[-1] <= SMALLEST and len(calls) == 9


def test_weights_without_a_gradient_keep_theirs() -> None:
    used, unused, fresh = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    unused.grad = torch.tensor([2.0])
    LossScale().backward([used, unused, fresh], backward_of(used, 1.0, []))
    assert used.grad.item() == 1.0 and unused.grad.item() == 2.0 and fresh.grad is None
