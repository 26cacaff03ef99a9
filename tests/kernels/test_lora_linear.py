"""LoRA layers in one autograd node, against the merged weight ``W + s B A`` in float64."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from .kernel_tests import DEVICE, TYPES, distance, filled_with_nan, run_interpreted, runs

pytest.importorskip("triton")
from posttrain.kernels import reference
from posttrain.kernels.lora_linear import lora_linear, lora_mlp, lora_qkv
from posttrain.kernels.reference import Adapted, Dense

__all__ = ["filled_with_nan"]
HALF = [torch.bfloat16] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]
WIDE = [torch.float64, torch.float32]


def test_under_the_interpreter():
    run_interpreted(__file__, at_least=30)


class Packed:
    """A frozen layer stored in a form of its own: transposed, at twice its value."""

    def __init__(self, weight, bias):
        self.stored, self.bias = 2 * weight.T, bias
        self.out_features = len(weight)

    def dense(self, dtype):
        return Dense((self.stored / 2).T, self.bias)

    def product(self, x):
        y = x @ (self.stored / 2)
        return y if self.bias is None else y + self.bias

    def input_gradient(self, gradient):
        return gradient @ (self.stored / 2).T


class Involved(Packed):
    """One whose product cannot be had from a weight alone."""

    def dense(self, dtype):
        return None


def layer(outputs, inputs, rank, *, dtype, seed, bias=False, frozen=Dense, scaling=0.7):
    """Weights of size 1/√inputs, so that every y is about 1; A and B float32 (float64 beside float64)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, size=1.0):
        return (size * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(DEVICE)

    weight = normal(outputs, inputs, size=inputs**-0.5).to(dtype)
    held = frozen(weight, normal(outputs).to(dtype) if bias else None)
    if not rank:
        return Adapted(held)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = normal(rank, inputs, size=inputs**-0.5).to(kind), normal(outputs, rank, size=rank**-0.5).to(kind)
    return Adapted(held, a.requires_grad_(), b.requires_grad_(), scaling)


def merged(x, adapted):
    """In float64, by one product."""
    frozen = adapted.frozen
    weight = frozen.weight if isinstance(frozen, Dense) else frozen.stored.T / 2
    weight = weight.double()
    if adapted.a is not None:
        weight = weight + adapted.scaling * adapted.b.double() @ adapted.a.double()
    y = x.double() @ weight.T
    return y if frozen.bias is None else y + frozen.bias.double()


def merged_mlp(x, inner, down, activation):
    outputs = [merged(x, adapted) for adapted in inner]
    gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
    sigmoid = 1 / (1 + torch.exp(-gate))
    inside = (8 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)  # tanh-gelu is x · sigmoid of this
    gated = gate * (sigmoid if activation == "silu" else 1 / (1 + torch.exp(-inside)))
    return merged(gated * up, down)


def inputs(*shape, dtype, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(DEVICE, dtype).requires_grad_()


def results(function, x, layers):
    """Outputs, then the gradients of x and of every A and B under a fixed weighting of the outputs."""
    outputs = function(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype) for y in outputs]
    trained = [tensor for adapted in layers for tensor in adapted[1:3] if tensor is not None]
    wanted = [x, *trained] if x.requires_grad else trained
    return [*outputs, *torch.autograd.grad(list(outputs), wanted, weights)]


def assert_close(found, expected, relative):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert distance(ours, theirs) <= relative * theirs.abs().max().item()


LINEARS = {
    "bias": [{"rank": 3, "bias": True}],
    "no adapter": [{"rank": 0, "bias": True}],
    "q, k, v": [{"rank": 3}, {"rank": 3}, {"rank": 3}],
    "ranks and gaps": [{"rank": 2, "bias": True}, {"rank": 0}, {"rank": 5, "scaling": 2.5}],
    "none of three": [{"rank": 0}, {"rank": 0}, {"rank": 0}],
}


@pytest.mark.parametrize("frozen", [Dense, Packed, Involved])
@pytest.mark.parametrize("case", LINEARS)
@pytest.mark.parametrize("dtype", WIDE)
def test_linears_and_gradients_are_those_of_the_merged_weight(case, dtype, frozen):
    sizes = (12, 6, 9)
    layers = [
        layer(outputs, 41, dtype=dtype, seed=seed, frozen=frozen, **settings)
        for seed, (outputs, settings) in enumerate(zip(sizes, LINEARS[case]))
    ]
    x = inputs(3, 5, 41, dtype=dtype)
    expected = results(lambda x: tuple(merged(x, adapted) for adapted in layers), x, layers)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert_close(results(lambda x: lora_qkv(x, layers), x, layers), expected, tolerance)
    if len(layers) == 1:
        assert_close(results(lambda x: lora_linear(x, *layers[0]), x, layers), expected, tolerance)


@pytest.mark.parametrize("case", LINEARS)
def test_reference_is_the_merged_weight(case):
    layers = [layer(7, 41, dtype=torch.float64, seed=seed, **settings) for seed, settings in enumerate(LINEARS[case])]
    x = inputs(5, 41, dtype=torch.float64)
    expected = results(lambda x: tuple(merged(x, adapted) for adapted in layers), x, layers)
    assert_close(results(lambda x: reference.lora_qkv(x, layers), x, layers), expected, 1e-12)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("frozen", [Dense, Packed, Involved])
def test_linears_in_half_precision_err_at_most_twice_as_much_as_torch(dtype, frozen):
    layers = [layer(40, 341, 8, dtype=dtype, seed=seed, bias=True, frozen=frozen) for seed in range(2)]
    x = inputs(129, 341, dtype=dtype)
    exact = results(lambda x: tuple(merged(x, adapted) for adapted in layers), x, layers)
    torchs = results(lambda x: reference.lora_qkv(x, layers), x, layers)
    for ours, theirs, expected in zip(results(lambda x: lora_qkv(x, layers), x, layers), torchs, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert distance(ours, expected) <= 2 * distance(theirs, expected)


def test_adapter_is_rounded_as_it_is_published():
    b = torch.tensor([[1.003], [0.777], [-3.1415]], device=DEVICE)
    x, a = torch.ones(1, 1, device=DEVICE, dtype=torch.bfloat16), torch.ones(1, 1, device=DEVICE)
    frozen = Dense(torch.zeros(3, 1, device=DEVICE, dtype=torch.bfloat16))
    # 0.3 · 1.003 = 0.3009, and so on: multiplied first, then rounded to eight bits
    expected = torch.tensor([[0.30078125, 0.2333984375, -0.94140625]], dtype=torch.bfloat16)
    assert torch.equal(lora_linear(x, frozen, a, b, 0.3).cpu(), expected)


def test_gradients_of_the_adapter_are_not_rounded_to_the_activations_type():
    tokens = 257
    x = torch.ones(tokens, 1, device=DEVICE, dtype=torch.bfloat16)
    a, b = (torch.ones(1, 1, device=DEVICE, requires_grad=True) for _ in range(2))
    lora_linear(x, Dense(torch.zeros_like(x[:1])), a, b, 1.0).backward(torch.ones_like(x))
    assert a.grad.item() == b.grad.item() == tokens  # in bfloat16 it would be 256


def test_frozen_input_and_partly_frozen_adapter():
    adapted = layer(7, 9, 2, dtype=torch.float64, seed=0)
    x = inputs(4, 9, dtype=torch.float64)
    expected = results(lambda x: merged(x, adapted), x, [adapted])
    found = results(lambda x: lora_linear(x, *adapted), x.detach(), [adapted])
    assert_close(found, [expected[0], *expected[2:]], 1e-12)
    adapted.b.requires_grad_(False)
    lora_linear(x, *adapted).backward(torch.ones(4, 7, dtype=torch.float64, device=DEVICE))
    assert adapted.b.grad is None and adapted.a.grad is not None


def saved_by(function):
    """Shapes of what autograd keeps."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        function()
    return sorted(shapes)


def test_nothing_but_x_and_ranks_is_saved():
    layers = [layer(12, 41, 3, dtype=torch.float32, seed=seed) for seed in range(3)]
    x = inputs(5, 41, dtype=torch.float32)
    parameters = [(3, 41), (12, 3)] * 3
    assert saved_by(lambda: lora_qkv(x, layers)) == sorted([(5, 41), (5, 9), *parameters])


MLPS = {
    "silu": ("silu", [17, 17], [3, 3, 3]),
    "gelu_tanh": ("gelu_tanh", [17, 17], [2, 0, 4]),
    "one layer for both": ("silu", [34], [3, 3]),
    "no adapter on down": ("gelu_tanh", [34], [3, 0]),
    "no adapter": ("silu", [17, 17], [0, 0, 0]),
}


def mlp_of(case, dtype, frozen=Dense):
    activation, outputs, ranks = MLPS[case]
    sizes = [*((out, 41) for out in outputs), (41, 17)]
    layers = [
        layer(*size, rank, dtype=dtype, seed=seed, bias=seed == 0, frozen=frozen)
        for seed, (size, rank) in enumerate(zip(sizes, ranks))
    ]
    return layers[:-1], layers[-1], activation


@runs
@pytest.mark.parametrize("frozen", [Dense, Packed, Involved])
@pytest.mark.parametrize("case", MLPS)
@pytest.mark.parametrize("dtype", TYPES)
def test_mlp_errs_at_most_twice_as_much_as_torch(filled_with_nan, case, dtype, frozen):
    inner, down, activation = mlp_of(case, dtype, frozen)
    x, layers = inputs(13, 9, 41, dtype=dtype), [*inner, down]  # many numbers: a few may hit the mark by luck
    exact = results(lambda x: merged_mlp(x, inner, down, activation), x, layers)
    torchs = results(lambda x: reference.lora_mlp(x, inner, down, activation), x, layers)
    found = results(lambda x: lora_mlp(x, inner, down, activation), x, layers)
    for ours, theirs, expected in zip(found, torchs, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        floor = 1e-6 * expected.norm()
        assert (ours.double() - expected).norm() <= max(2 * (theirs.double() - expected).norm(), floor)


@pytest.mark.parametrize("case", MLPS)
def test_reference_mlp_is_the_merged_weights(case):
    inner, down, activation = mlp_of(case, torch.float64)
    x, layers = inputs(9, 41, dtype=torch.float64), [*inner, down]
    expected = results(lambda x: merged_mlp(x, inner, down, activation), x, layers)
    found = results(lambda x: reference.lora_mlp(x, inner, down, activation), x, layers)
    assert_close(found, expected, 1e-12)


@runs
def test_mlp_saves_x_gate_up_and_ranks_and_can_go_back_once():
    inner, down, activation = mlp_of("silu", torch.float32)
    x = inputs(9, 41, dtype=torch.float32)
    parameters = chain.from_iterable((tuple(t.shape) for t in adapted[1:3]) for adapted in (*inner, down))
    kept = [(9, 41), (9, 17), (9, 17), (9, 6), (9, 3)]
    assert saved_by(lambda: lora_mlp(x, inner, down, activation)) == sorted([*kept, *parameters])
    y = lora_mlp(x, inner, down, activation).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@runs
def test_mlp_without_gradients_is_the_same():
    inner, down, activation = mlp_of("gelu_tanh", torch.float32)
    x = inputs(9, 41, dtype=torch.float32)
    with torch.no_grad():
        alone = lora_mlp(x, inner, down, activation)
    assert torch.equal(alone, lora_mlp(x, inner, down, activation))


@runs
@pytest.mark.parametrize("case", MLPS)
def test_mlp_whose_output_is_not_used_has_the_same_gradients(filled_with_nan, case):
    inner, down, activation = mlp_of(case, torch.float32, Packed)
    x, layers = inputs(9, 41, dtype=torch.float32), [*inner, down]
    y, *expected = results(lambda x: lora_mlp(x, inner, down, activation), x, layers)
    down.frozen.product = None  # not called
    zeros, *found = results(lambda x: lora_mlp(x, inner, down, activation, output_used=False), x, layers)
    assert zeros.shape == y.shape and not zeros.any()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
