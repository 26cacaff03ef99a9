"""Schedules and optimizer steps, by hand."""

from __future__ import annotations

import builtins
import math

import pytest
import torch
from torch import nn

from posttrain.rl.config import TrainerConfig
from posttrain.rl.errors import CheckpointError, EngineError
from posttrain.trainer.optim import Optimizer, learning_rate_at

from .tiny import step_params


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [8, 8, 8, 8, 8, 8]),
        ("constant", 4, [2, 4, 6, 8, 8, 8]),
        ("linear", 0, [8, 8 * 5 / 6, 8 * 4 / 6, 4, 8 * 2 / 6, 8 / 6]),
        ("linear", 2, [4, 8, 8, 6, 4, 2]),
        ("cosine", 2, [4, 8, 8, 4 * (1 + math.sqrt(0.5)), 4, 4 * (1 - math.sqrt(0.5))]),
        ("linear", 9, [8 / 9, 16 / 9, 24 / 9, 32 / 9, 40 / 9, 48 / 9]),
    ],
)
def test_learning_rates_by_hand(schedule, warmup, expected):
    config = TrainerConfig(learning_rate=8.0, schedule=schedule, warmup_steps=warmup)
    assert [learning_rate_at(step, 6, config) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_is_nil_beyond_the_last_step(schedule):
    config = TrainerConfig(learning_rate=8.0, schedule=schedule)
    assert [learning_rate_at(step, 6, config) for step in (6, 7, 60)] == pytest.approx([0, 0, 0])


def adam(value, gradients, rate, betas, eps, decay):
    """AdamW (1711.05101, algorithm 2) on one number."""
    first = second = 0.0
    for step, gradient in enumerate(gradients, 1):
        value -= rate * decay * value
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        value -= rate * (first / (1 - betas[0] ** step)) / (math.sqrt(second / (1 - betas[1] ** step)) + eps)
    return value


def test_adamw_by_hand_with_the_parameters_of_the_step():
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = Optimizer({"w": weight}, TrainerConfig())
    for gradient in (0.3, -0.1, 0.5):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        params = step_params(0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, max_grad_norm=math.inf)
        assert optimizer.step(params) == pytest.approx(abs(gradient))
        assert weight.grad is None
    assert weight.item() == pytest.approx(adam(2.0, (0.3, -0.1, 0.5), 0.01, (0.8, 0.95), 1e-3, 0.1), rel=1e-9)


def test_clipping_is_by_the_norm_over_all_weights():
    one, two = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer = Optimizer({"one": one, "two": two}, TrainerConfig())
    one.grad, two.grad = torch.tensor([3.0, 0.0]).double(), torch.tensor([0.0, 4.0]).double()
    # an epsilon of 1 makes Adam's first step rate · g / (|g| + 1): the clipped gradient shows
    assert optimizer.step(step_params(1.0, eps=1.0, max_grad_norm=1.0)) == pytest.approx(5.0)
    assert one.tolist() == pytest.approx([-0.6 / 1.6, 0.0], rel=1e-5)
    assert two.tolist() == pytest.approx([0.0, -0.8 / 1.8], rel=1e-5)


def test_a_small_gradient_is_not_scaled_up():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    weight.grad = torch.tensor([0.25]).double()
    assert Optimizer({"w": weight}, TrainerConfig()).step(step_params(1.0, eps=1.0)) == pytest.approx(0.25)


def test_half_precision_weights_have_a_float32_master():
    # 1 − 1e-4 ten times: bfloat16 alone (steps of 2^-8 below 1) would never leave 1.
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Optimizer({"w": weight}, TrainerConfig())
    for _ in range(40):
        (weight * 3.0).sum().backward()
        optimizer.step(step_params(1e-4, max_grad_norm=math.inf))
    assert optimizer.state_dict()["masters"]["w"].item() == pytest.approx(1 - 40e-4, abs=1e-5)
    assert weight.dtype == torch.bfloat16 and weight.item() == pytest.approx(1 - 2**-8)


def test_gradients_of_half_precision_weights_add_up_in_float32():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Optimizer({"w": weight}, TrainerConfig())
    for factor in (256.0, 1.0, 1.0, 1.0):  # in bfloat16 256 + 1 is 256
        (weight * factor).sum().backward()
    assert optimizer.step(step_params(max_grad_norm=math.inf)) == pytest.approx(259.0)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_reset_forgets_the_moments(kind):
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.ones(8192))
    optimizer = Optimizer({"w": weight}, TrainerConfig(optimizer=kind))
    for _ in range(5):
        weight.grad = torch.full((8192,), -1.0)
        optimizer.step(step_params(0.1))
    optimizer.reset()
    before = weight.detach().clone()
    weight.grad = torch.ones(8192)
    optimizer.step(step_params(0.1, max_grad_norm=math.inf))
    # Adam's first step is one rate against the sign; with moments of the opposite sign it would not be.
    torch.testing.assert_close(weight.detach(), before - 0.1, rtol=0, atol=2e-3)


def test_eight_bit_adamw_follows_adamw():
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8192, generator=generator)
    weights = {kind: nn.Parameter(start.clone()) for kind in ("adamw", "adamw_8bit")}
    optimizers = {kind: Optimizer({"w": weight}, TrainerConfig(optimizer=kind)) for kind, weight in weights.items()}
    for _ in range(4):
        gradient = torch.randn(8192, generator=generator)
        for kind, weight in weights.items():
            weight.grad = gradient.clone()
            optimizers[kind].step(step_params(1e-2))
    moved = (weights["adamw"] - start).norm()
    assert (weights["adamw"] - weights["adamw_8bit"]).norm() < 0.05 * moved
    state = optimizers["adamw_8bit"].state_dict()["adam"]["state"][0]
    assert any(
        value.dtype == torch.uint8
        for value in state["__bnb_optimizer_quant_state__"].values()
        if torch.is_tensor(value)
    )


def test_eight_bit_adamw_without_its_extra_is_one_clear_error(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EngineError, match=r"posttrain\[bnb\]"):
        Optimizer({"w": nn.Parameter(torch.ones(1))}, TrainerConfig(optimizer="adamw_8bit"))


def test_state_of_another_optimizer_or_model_is_refused():
    optimizer = Optimizer({"w": nn.Parameter(torch.ones(1))}, TrainerConfig())
    state = optimizer.state_dict()
    with pytest.raises(CheckpointError, match=r"trainer\.optimizer = adamw_8bit"):
        optimizer.load_state_dict({**state, "kind": "adamw_8bit"})
    with pytest.raises(CheckpointError, match="other weights: v, w"):
        optimizer.load_state_dict({**state, "names": ["v"]})
