"""RMS norms against float64: on a GPU as compiled, without one under Triton's interpreter (in a child process); and
compiled for GPUs that are not there.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from posttrain.kernels import reference
from tests.kernels.against_float64 import assert_error_is_at_most_twice_torchs, drawn
from tests.kernels.kernel_tests import CAPABILITIES, DEVICE, INTERPRETED, TYPES, compiled, run_interpreted, runs
from tests.kernels.kernel_tests import filled_with_nan as filled_with_nan

pytest.importorskip("triton")
from posttrain.kernels import rms_norm as module
from posttrain.kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5
SHAPES = [(1, 9), (3, 41), (2, 5, 341), (9, 1040), (0, 41), (2, 5000)]
if DEVICE == "cuda":
    SHAPES += [(341, 2560), (4096, 4096), (70, module.WIDEST)]


def test_under_the_interpreter():
    run_interpreted(__file__, at_least=45)


def plain(x, weight, offset):
    """Llama's, or with an offset Gemma's, as transformers has them."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if offset:
        return (normed * (offset + weight.to(wide.dtype))).to(x.dtype)
    return weight.to(x.dtype) * normed.to(x.dtype)


def plain_add(x, residual, weight, offset):
    """In float64 the sum is still rounded to the type of the test, which its inputs say: they are exact in it."""
    total = x + residual
    return plain(total, weight, offset), total


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_error_is_at_most_twice_torchs(shape, dtype, offset, filled_with_nan):
    inputs = [3 * drawn(*shape, dtype=dtype), drawn(shape[-1], dtype=dtype, seed=1)]
    for function in (rms_norm, reference.rms_norm):
        ours = partial(function, eps=EPS, offset=offset)
        assert_error_is_at_most_twice_torchs(ours, partial(plain, offset=offset), inputs)


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_with_the_residual_is_at_most_twice_torchs(shape, dtype, filled_with_nan):
    # Multiples of 1/8 below 8 in absolute value: their sums are exact in every type, so float64 has the same sum.
    x, residual = ((drawn(*shape, seed=seed) * 8).round().clamp(-60, 60).to(dtype) / 8 for seed in (0, 2))
    inputs = [x, residual, drawn(shape[-1], dtype=dtype, seed=1)]
    for function in (add_rms_norm, reference.add_rms_norm):
        assert_error_is_at_most_twice_torchs(partial(function, eps=EPS), partial(plain_add, offset=0.0), inputs)


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_sum_is_torchs_and_the_norm_is_of_the_rounded_sum(dtype, filled_with_nan):
    x, residual, weight = drawn(5, 341, dtype=dtype), 100 * drawn(5, 341, dtype=dtype, seed=1), drawn(341, seed=2)
    normed, total = add_rms_norm(x, residual, weight, EPS, offset=1.0)
    assert torch.equal(total, x + residual) and total.is_contiguous()
    assert torch.equal(normed, rms_norm(total, weight, EPS, offset=1.0))


@runs
@pytest.mark.parametrize("of_normed", [True, False])
@pytest.mark.parametrize("of_total", [True, False])
def test_either_output_may_go_unused(of_normed, of_total, filled_with_nan):
    inputs = [drawn(3, 41, seed=seed).requires_grad_() for seed in range(2)] + [drawn(41, seed=2).requires_grad_()]

    def loss(outputs):
        used = [y * y for y, use in zip(outputs, (of_normed, of_total), strict=True) if use]
        return torch.stack(used).sum() if used else outputs[0].sum() * 0

    found = torch.autograd.grad(loss(add_rms_norm(*inputs, EPS)), inputs, allow_unused=True)
    expected = torch.autograd.grad(loss(plain_add(*inputs, 0.0)), inputs, allow_unused=True)
    assert (found[2] is None) == (expected[2] is None)
    for mine, right in zip(found, expected, strict=True):
        if right is not None:
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@runs
def test_the_gradients_of_x_and_residual_can_be_accumulated_apart(filled_with_nan):
    x, residual, weight = (drawn(*shape, seed=1).contiguous().requires_grad_() for shape in ((3, 41), (3, 41), (41,)))
    sum(y.sum() for y in add_rms_norm(x, residual, weight, EPS)).backward()
    once = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, once) and once.any()
    sum(y.sum() for y in add_rms_norm(x, residual, weight, EPS)).backward()
    assert torch.equal(x.grad, once) and torch.equal(residual.grad, 2 * once)


@runs
def test_a_frozen_weight_gets_no_gradient_and_x_the_same_one(monkeypatch, filled_with_nan):
    grads = []
    for frozen in (False, True):
        x, weight = drawn(9, 341).requires_grad_(), drawn(341, seed=1).requires_grad_(not frozen)
        rms_norm(x, weight, EPS).square().sum().backward()
        assert (weight.grad is None) == frozen
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)


@runs
def test_the_gradient_of_a_weight_is_summed_over_every_tile_and_in_a_fixed_order(monkeypatch, filled_with_nan):
    monkeypatch.setattr(module, "PROGRAMS", 1)
    monkeypatch.setattr(module, "BACKWARD", module.BACKWARD._replace(elements=64))
    rows = 9 * 300 if DEVICE == "cuda" else 41
    x, grad, weight = drawn(rows, 41), drawn(rows, 41, seed=1), drawn(41, seed=2)
    twice = [module.rms_norm_backward((grad, None), x, weight, EPS, 0.0, True)[1] for _ in range(2)]
    normed = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    assert torch.equal(twice[0], twice[1])
    torch.testing.assert_close(twice[0].double(), (grad.double() * normed).sum(0), rtol=1e-5, atol=1e-4)


@runs
def test_a_float32_weight_of_a_half_precision_model_keeps_its_digits(filled_with_nan):
    x, weight = drawn(5, 41, dtype=torch.float16), 1 + drawn(41, seed=1) / 4096
    expected = plain(x.double(), weight.double(), 0.0)
    y = rms_norm(x, weight.requires_grad_(), EPS)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), expected, rtol=1.01 * 2**-11, atol=1e-7)  # one rounding
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_rows_beyond_2_to_the_31_elements_are_found():
    wide = torch.zeros(65600, 32800, dtype=torch.float16, device=DEVICE)[:, :9]
    wide[-1] = torch.arange(9.0)
    y = rms_norm(wide, torch.ones(9, device=DEVICE), EPS)
    expected = plain(wide[-1].double(), torch.ones(9, device=DEVICE), 0.0)
    torch.testing.assert_close(y[-1], expected.half())
    assert not y[:-1].any()


def test_rows_that_do_not_fit_and_other_types_are_refused():
    with pytest.raises(AssertionError, match="weight"):
        rms_norm(torch.ones(2, module.WIDEST + 1), torch.ones(module.WIDEST + 1), EPS)
    with pytest.raises(AssertionError, match="float64"):
        rms_norm(torch.ones(2, 8, dtype=torch.float64), torch.ones(8), EPS)


def kernel_for(name, width, capability, element, **changes):
    kernel, tiles = (
        (module._rms_norm_fwd_kernel, module.FORWARD)
        if name == "forward"
        else (module._rms_norm_bwd_kernel, module.BACKWARD)
    )
    block_m, block_h, warps = module._tile(torch.empty(1, width), torch.empty(width), tiles)
    pointers = {name: element for name in kernel.arg_names if name.endswith("_ptr")}
    pointers |= {"sums_ptr": "fp32"} if name == "backward" else {}
    constants = {"H": width, "ADD": True, "BLOCK_M": block_m, "BLOCK_H": block_h} | changes
    strides = tuple(name for name in kernel.arg_names if name.startswith("stride")) if width % 16 == 0 else ()
    floats = ("eps", "offset")
    return compiled(kernel, capability, pointers, constants, floats=floats, aligned=strides, warps=warps)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_they_compile_for_gpus_that_are_not_here(capability):
    element = "fp16" if capability < 80 else "bf16"
    for name, changes in (("forward", {}), ("backward", {"WEIGHT_GRADIENT": False})):
        ptx = kernel_for(name, 2560, capability, element, **changes).asm["ptx"]
        narrow = ("ld.global.b16", "ld.global.b32", "st.global.b16", "st.global.b32")
        assert "ld.global.v4.b32" in ptx and not any(access in ptx for access in narrow), "16 bytes at once"


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("element", ["fp16", "fp32"])
@pytest.mark.parametrize("width", [41, 128, module.WIDEST])
def test_every_variant_compiles(element, width):
    for add in (False, True):
        kernel_for("forward", width, 90, element, ADD=add)
        kernel_for("backward", width, 90, element, ADD=add, WEIGHT_GRADIENT=not add)
