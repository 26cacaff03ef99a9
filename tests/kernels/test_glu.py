"""Gated units against float64: on a GPU as compiled, without one under Triton's interpreter (in a child process); and
compiled for GPUs that are not there.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from posttrain.kernels import reference
from tests.kernels.against_float64 import assert_error_is_at_most_twice_torchs, drawn
from tests.kernels.kernel_tests import CAPABILITIES, DEVICE, INTERPRETED, TYPES, compiled, run_interpreted, runs
from tests.kernels.kernel_tests import filled_with_nan as filled_with_nan

pytest.importorskip("triton")
from posttrain.kernels import glu as module
from posttrain.kernels.glu import glu, glu_backward_, glu_forward

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
SHAPES = [(1, 9), (3, 41), (2, 3, 341), (2, 2057), (0, 41)]
if DEVICE == "cuda":
    SHAPES += [(341, 9728), (4096, 14336)]


def test_under_the_interpreter():
    run_interpreted(__file__, at_least=30)


def plain(gate, up, activation):
    return ACTIVATIONS[activation](gate) * up


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_is_at_most_twice_torchs(shape, dtype, activation, filled_with_nan):
    inputs = [3 * drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)]
    for function in (glu, reference.glu):
        ours = partial(function, activation=activation)
        assert_error_is_at_most_twice_torchs(ours, partial(plain, activation=activation), inputs)


@runs
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero_it_is_exact_and_finite(activation, filled_with_nan):
    points = torch.tensor([0.0, 1e-30, 5.0, 9.0, 30.0, 100.0, 1e4, 1e9], device=DEVICE)
    gate = torch.cat((points, -points)).view(2, -1).requires_grad_()
    wide = gate.detach().double().requires_grad_()
    up = torch.ones_like(gate)
    h, expected = glu(gate, up, activation), plain(wide, up.double(), activation)
    h.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(h.double(), expected, rtol=4e-6, atol=1e-12)
    torch.testing.assert_close(gate.grad.double(), wide.grad, rtol=4e-6, atol=1e-11)


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fused", [False, True])
def test_the_backward_in_place_leaves_its_results_where_its_inputs_were(dtype, activation, fused, filled_with_nan):
    grad_h = drawn(1, 5, 341, dtype=dtype).contiguous()
    gate, up = 3 * drawn(1, 5, 341, dtype=dtype, seed=1), drawn(1, 5, 341, dtype=dtype, seed=2)
    for ours in (reference, module):
        leaves = [x.detach().clone().requires_grad_() for x in (gate, up)]
        h = ours.glu(*leaves, activation)
        expected = [h, *torch.autograd.grad(h, leaves, grad_h)]
        halves = torch.cat((gate, up), -1).chunk(2, -1) if fused else (gate.contiguous(), up.contiguous())
        arguments = [grad_h.clone(), *halves]
        found = ours.glu_backward_(*arguments, activation)
        assert [x.data_ptr() for x in found] == [x.data_ptr() for x in arguments]
        assert all(map(torch.equal, found, expected)) and all(map(torch.equal, arguments, expected))


@runs
def test_autograd_keeps_the_inputs_as_they_are_and_nothing_else(filled_with_nan):
    gate, up = drawn(3, 41).requires_grad_(), drawn(3, 41, seed=1).requires_grad_()
    before, kept = [x.detach().clone() for x in (gate, up)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        h = glu(gate, up, "silu")
    h.sum().backward()
    assert kept == [gate.data_ptr(), up.data_ptr()]
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


@runs
def test_only_one_input_may_need_a_gradient(filled_with_nan):
    gate, up = drawn(3, 41), drawn(3, 41, seed=1).requires_grad_()
    glu(gate, up, "silu").sum().backward()
    torch.testing.assert_close(up.grad, F.silu(gate), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_rows_beyond_2_to_the_31_elements_are_found():
    wide = torch.zeros(65600, 32800, dtype=torch.float16, device=DEVICE)[:, :18]
    wide[-1] = torch.linspace(-2, 2, 18)
    h = glu_forward(*wide.chunk(2, -1), "silu")
    torch.testing.assert_close(h[-1], reference.glu_forward(*wide[-1].chunk(2, -1), "silu"))
    assert not h[:-1].any()


def test_what_cannot_be_written_over_or_is_of_another_type_is_refused():
    square = torch.ones(4, 4)
    with pytest.raises(AssertionError, match="contiguous"):
        glu_backward_(square.clone(), square.clone().T, square.clone(), "silu")
    with pytest.raises(AssertionError, match="float64"):
        glu_forward(square.double(), square.double(), "silu")


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("element", ["16 bit", "fp32"])
def test_they_compile_for_gpus_that_are_not_here_and_read_16_bytes_at_once(capability, gelu, element):
    if element == "16 bit":
        element = "fp16" if capability < 80 else "bf16"
    variants = [(module._glu_fwd_kernel, module.FORWARD, {})]
    variants += [(module._glu_bwd_kernel, module.BACKWARD, {"WRITE_H": write_h}) for write_h in (False, True)]
    for kernel, tiles, constants in variants:
        pointers = {name: element for name in kernel.arg_names if name.endswith("_ptr")}
        strides = tuple(name for name in kernel.arg_names if name.startswith("stride"))
        constants |= {"GELU": gelu, "BLOCK_I": tiles.columns}
        found = compiled(kernel, capability, pointers, constants, aligned=("width", *strides), warps=tiles.warps)
        for access in ("ld.global", "st.global"):
            assert f"{access}.v4.b32" in found.asm["ptx"] and f"{access}.b" not in found.asm["ptx"]
