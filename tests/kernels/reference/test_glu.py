"""The definition of gated units against transformers' activations."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from posttrain.kernels.reference import glu, glu_backward_, glu_forward

NAMES = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


@pytest.mark.parametrize("activation", NAMES)
def test_it_is_what_models_compute(activation):
    gate, up = torch.randn(3, 41), torch.randn(3, 41)
    assert torch.equal(glu(gate, up, activation), ACT2FN[NAMES[activation]](gate) * up)
    half = glu(gate.half(), up.half(), activation)
    assert torch.equal(half, (ACT2FN[NAMES[activation]](gate.half().float()) * up.half().float()).half())


@pytest.mark.parametrize("activation", NAMES)
def test_gradients_are_those_of_differences_and_of_the_backward_in_place(activation):
    gate, up, grad = (torch.randn(2, 9, dtype=torch.float64, requires_grad=index < 2) for index in range(3))
    assert torch.autograd.gradcheck(lambda gate, up: glu(gate, up, activation), (gate, up))
    h = glu(gate, up, activation)
    expected = [h.detach(), *torch.autograd.grad(h, (gate, up), grad)]
    assert not glu_forward(gate, up, activation).requires_grad
    arguments = [x.detach().clone() for x in (grad, gate, up)]
    found = glu_backward_(*arguments, activation)
    assert all(x is y for x, y in zip(found, arguments, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
