"""Float8 weights: the product against float64, the dequantized matrix bit for bit."""

from __future__ import annotations

import pytest
import torch

from posttrain.kernels import reference
from tests.kernels.kernel_tests import (
    CAPABILITIES,
    DEVICE,
    INTERPRETED,
    TYPES,
    compiled,
    distance,
    filled_with_nan,  # noqa: F401 - a fixture
    run_interpreted,
    runs,
)

triton = pytest.importorskip("triton")
from posttrain.kernels import fp8, fp8_linear, launch, split_k  # noqa: E402 - needs triton

SHAPES = [(1, 9, 41), (3, 70, 128), (16, 64, 1041), (17, 41, 512), (33, 130, 341), (70, 129, 1024), (130, 9, 320)]
"""Rows, outputs, inputs; 1024 and 1041 inputs are cut into parts."""
if DEVICE == "cuda":
    SHAPES += [(8, 2560, 9728), (64, 6144, 2560), (200, 2560, 4096)]


def test_under_the_interpreter():
    run_interpreted(__file__, 3 * len(SHAPES) * len(TYPES) + 4 * len(WEIGHTS) * len(TYPES))


def problem(shape, dtype, scales, seed=0):
    """x, a transposed weight cut out of a larger one, its scale, and a bias with gaps."""
    rows, outputs, inputs = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs + 3, generator=generator)[:, :inputs].to(dtype)
    stored = torch.randn(outputs + 5, inputs + 7, generator=generator) * 10
    stored[:, ::5] *= 0.001  # subnormal in e4m3
    weight = stored.to(torch.float8_e4m3fn).t()[:inputs, :outputs].t()
    sizes = {"one": (1,), "row": (outputs,), "column": (outputs, 1), "square": (-(-outputs // 128), -(-inputs // 128))}
    scale = torch.rand(sizes[scales], generator=generator) / 50 + 0.01
    bias = torch.randn(outputs, 2, generator=generator)[:, 0].to(dtype)
    return tuple(tensor.to(DEVICE) for tensor in (x, weight, scale, bias))


def spread(scale, outputs, inputs):
    """The scale of every weight, float64 [outputs, inputs]."""
    rows, columns = torch.arange(outputs)[:, None], torch.arange(inputs)[None, :]
    if scale.numel() == 1:
        return scale.double().expand(outputs, inputs)
    if scale.numel() == outputs:
        return scale.double().view(-1, 1).expand(outputs, inputs)
    return scale.double()[rows // 128, columns // 128]


def exact(x, weight, scale, bias):
    """In float64, the scale spread out by hand."""
    return x.double() @ (weight.double() * spread(scale, *weight.shape)).T + bias.double()


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scales", ["one", "column", "square"])
def test_error_is_at_most_twice_torchs(shape, dtype, scales, filled_with_nan):  # noqa: F811
    if scales == "column" and shape[1] == 1:
        pytest.skip("one")
    x, weight, scale, bias = problem(shape, dtype, scales)
    y = fp8_linear.fp8_linear(x, weight, scale, bias)
    expected = exact(x, weight, scale, bias)
    theirs = torch.nn.functional.linear(x, reference.dequantize_fp8(weight, scale, dtype), bias)
    assert y.dtype == dtype and y.shape == expected.shape and y.is_contiguous()
    floor = expected.abs().max().item() * torch.finfo(torch.float32).eps * shape[2] ** 0.5
    assert distance(y, expected) <= 2 * distance(theirs, expected) + floor
    assert distance(reference.fp8_linear(x, weight, scale, bias), expected) <= 2 * distance(theirs, expected) + floor


@runs
@pytest.mark.parametrize("scales", ["row", "one"])
def test_no_bias_and_locks_that_are_used_again(scales, filled_with_nan):  # noqa: F811
    x, weight, scale, bias = problem((5, 70, 1100), torch.float32, scales)
    locks = torch.zeros(split_k.LOCKS, dtype=torch.int32, device=DEVICE)
    once, twice = (fp8_linear.fp8_linear(x, weight, scale, None, locks) for _ in range(2))
    assert torch.equal(once, twice) and not locks.any()
    expected = exact(x, weight, scale, torch.zeros_like(bias))
    torch.testing.assert_close(once.double(), expected, rtol=1e-5, atol=1e-4)


@runs
@pytest.mark.parametrize("native", [True, False] if DEVICE == "cuda" else [False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_bit_pattern_is_widened_exactly(native, dtype, monkeypatch):
    if native and not fp8.native_e4m3(torch.device(DEVICE)):
        pytest.skip("e4m3 is decoded by arithmetic here")
    monkeypatch.setattr(fp8_linear, "native_e4m3", lambda device: native)
    bits = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).view(256, 1)
    y = fp8_linear.fp8_linear(torch.ones(1, 1, dtype=dtype, device=DEVICE), bits, torch.ones(1, device=DEVICE))
    assert torch.equal(y[0].float().nan_to_num(-7.0), bits.float().view(-1).nan_to_num(-7.0))
    assert y.isnan().sum() == 2


@runs
@pytest.mark.parametrize(("rows", "capability"), [(fp8_linear.KERNEL_ROWS + 1, (9, 0)), (3, (7, 5))])
def test_many_rows_and_old_tensor_cores_go_through_torchs_product(rows, capability, monkeypatch):
    monkeypatch.setattr(fp8_linear, "_launch", None)
    monkeypatch.setattr(fp8_linear, "gpu", lambda device: launch.gpu(device)._replace(capability=capability))
    x, weight, scale, bias = problem((rows, 9, 41), torch.float32, "row")
    y = fp8_linear.fp8_linear(x, weight, scale, bias)
    torch.testing.assert_close(y.double(), exact(x, weight, scale, bias), rtol=1e-5, atol=1e-4)
    assert fp8_linear.fp8_linear(x[:0], weight, scale, bias).shape == (0, 9)


WEIGHTS = [(9, 41), (130, 300), (256, 128), (128, 32)]


@runs
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
@pytest.mark.parametrize("scales", ["one", "row", "column", "square"])
def test_dequantized_bit_for_bit(shape, dtype, scales, transposed, filled_with_nan):  # noqa: F811
    _, weight, scale, _ = problem((1, *shape), dtype, scales)
    if transposed:  # and cut out of a padded one, as vLLM leaves it
        held = torch.zeros(shape[1] + 7, shape[0] + 5, dtype=torch.uint8, device=DEVICE).view(weight.dtype)
        weight = held.t()[: shape[0], : shape[1]].copy_(weight)
    found = fp8.dequantize_fp8(weight, scale, dtype)
    # e4m3 times float32 has 28 significant bits at most: float64 holds it, and its float32 is the kernel's product
    assert torch.equal(found, (weight.double() * spread(scale, *shape)).float().to(dtype))
    assert torch.equal(found, reference.dequantize_fp8(weight, scale, dtype))
    assert found.dtype == dtype and (found.stride(0) < found.stride(1)) == transposed


def compiled_product(capability, tiles, element, **changes):
    native = capability >= 89
    pointers = {"x_ptr": element, "w_ptr": "fp8e4nv" if native else "u8", "scale_ptr": "fp32", "bias_ptr": element}
    pointers |= {"y_ptr": element, "sums_ptr": "fp32", "locks_ptr": "i32"}
    constants = {"SCALES": 0, "HAS_BIAS": False, "NATIVE": native, "EVEN_K": True, "CUT_K": True}
    constants |= {f"BLOCK_{side.upper()}": getattr(tiles, f"block_{side}") for side in "mnk"}
    constants |= {"stride_xk": 1, "stride_wk": 1} | changes
    aligned = ("N", "K", "stride_xm", "stride_wn")
    return compiled(
        fp8_linear._fp8_linear_kernel,
        capability,
        pointers,
        constants,
        aligned=aligned,
        warps=tiles.warps,
        stages=tiles.stages,
    )


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("side", [1, 128])
def test_the_dequantization_compiles(capability, by_column, side):
    native, element = capability >= 89, "fp16" if capability < 80 else "bf16"
    pointers = {"w_ptr": "fp8e4nv" if native else "u8", "scale_ptr": "fp32", "out_ptr": element}
    constants = {"SIDE": side, "BY_COLUMN": by_column, "NATIVE": native, "EVEN": True, "stride_wc": 1}
    constants |= {"BLOCK_R": fp8.BLOCK_ROWS, "BLOCK_C": reference.FP8_BLOCK}
    aligned = ("R", "C", "stride_wr")
    found = compiled(fp8._dequantize_fp8_kernel, capability, pointers, constants, aligned=aligned, warps=fp8.WARPS)
    assert "st.global.v4" in found.asm["ptx"], "sixteen bytes at a time"


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("tiles", fp8_linear.TILES, ids=lambda tiles: str(tiles.rows))
def test_it_compiles_for_gpus_that_are_not_here(capability, tiles):
    found = compiled_product(capability, tiles, "fp16" if capability < 80 else "bf16")
    assert ("wgmma" in found.asm["ptx"]) == (capability == 90), "Hopper's tensor cores"
    assert ("e4m3x2" in found.asm["ptx"]) == (capability >= 89)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("element", ["fp16", "fp32"])
@pytest.mark.parametrize("scales", [0, 1, 2])
def test_every_variant_compiles(element, scales):
    smallest = fp8_linear.TILES[0]
    compiled_product(90, smallest, element, SCALES=scales, HAS_BIAS=True, EVEN_K=False, CUT_K=False, BLOCK_K=64)
