"""The fp8 product against float64: on a GPU as compiled, without one under Triton's interpreter (in a child process);
and compiled for GPUs that are not there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from posttrain.kernels import reference

triton = pytest.importorskip("triton")
from posttrain.kernels import fp8_linear  # noqa: E402 - needs triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter's bfloat16 is wrong: it adds bit patterns and truncates.
TYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SHAPES = [(1, 9, 41), (3, 70, 128), (16, 64, 1041), (17, 41, 512), (33, 130, 341), (70, 129, 1024), (130, 9, 320)]
"""Rows, outputs, inputs; 1024 and 1041 inputs are cut into parts."""
if DEVICE == "cuda":
    SHAPES += [(8, 2560, 9728), (64, 6144, 2560), (200, 2560, 4096)]


def runs(test):
    """On a GPU, or in the child."""
    if INTERPRETED:
        return test
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")(test))


def test_under_the_interpreter():
    if INTERPRETED or DEVICE == "cuda":
        pytest.skip("the tests below run here")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 3 * len(SHAPES) * len(TYPES), done.stdout


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


def exact(x, weight, scale, bias):
    """In float64, the scale spread out by hand."""
    outputs, inputs = weight.shape
    if scale.ndim == 2 and scale.shape[1] > 1:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:outputs, :inputs]
    elif scale.numel() > 1:
        scale = scale.view(-1, *scale.shape[2:]).repeat_interleave(outputs // scale.shape[0], 0).view(-1, 1)
    return x.double() @ (weight.double() * scale.double()).T + bias.double()


def distance(y, expected):
    return (y.double() - expected).abs().max().item()


@pytest.fixture
def filled_with_nan(monkeypatch):
    """What a kernel forgets to write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scales", ["one", "column", "square"])
def test_error_is_at_most_twice_torchs(shape, dtype, scales, filled_with_nan):
    if scales == "column" and shape[1] == 1:
        pytest.skip("one")
    x, weight, scale, bias = problem(shape, dtype, scales)
    y = fp8_linear.fp8_linear(x, weight, scale, bias)
    expected = exact(x, weight, scale, bias)
    theirs = torch.nn.functional.linear(x, reference.fp8_weight(weight, scale, dtype), bias)
    assert y.dtype == dtype and y.shape == expected.shape and y.is_contiguous()
    floor = expected.abs().max().item() * torch.finfo(torch.float32).eps * shape[2] ** 0.5
    assert distance(y, expected) <= 2 * distance(theirs, expected) + floor
    assert distance(reference.fp8_linear(x, weight, scale, bias), expected) <= 2 * distance(theirs, expected) + floor


@runs
@pytest.mark.parametrize("scales", ["row", "one"])
def test_no_bias_and_locks_that_are_used_again(scales, filled_with_nan):
    x, weight, scale, bias = problem((5, 70, 1100), torch.float32, scales)
    locks = torch.zeros(fp8_linear.LOCKS, dtype=torch.int32, device=DEVICE)
    once, twice = (fp8_linear.fp8_linear(x, weight, scale, None, locks) for _ in range(2))
    assert torch.equal(once, twice) and not locks.any()
    expected = exact(x, weight, scale, torch.zeros_like(bias))
    torch.testing.assert_close(once.double(), expected, rtol=1e-5, atol=1e-4)


@runs
@pytest.mark.parametrize("native", [True, False] if DEVICE == "cuda" else [False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_bit_pattern_is_widened_exactly(native, dtype, monkeypatch):
    processors, able = fp8_linear._gpu(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
    if native and not able:
        pytest.skip("e4m3 is decoded by arithmetic here")
    monkeypatch.setattr(fp8_linear, "_gpu", lambda device: (processors, native))
    bits = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).view(256, 1)
    y = fp8_linear.fp8_linear(torch.ones(1, 1, dtype=dtype, device=DEVICE), bits, torch.ones(1, device=DEVICE))
    assert torch.equal(y[0].float().nan_to_num(-7.0), bits.float().view(-1).nan_to_num(-7.0))
    assert y.isnan().sum() == 2


def test_many_rows_go_through_torchs_product(monkeypatch):
    monkeypatch.setattr(fp8_linear, "_launch", None)
    x, weight, scale, bias = problem((fp8_linear.KERNEL_ROWS + 1, 9, 41), torch.float32, "row")
    y = fp8_linear.fp8_linear(x, weight, scale, bias)
    torch.testing.assert_close(y.double(), exact(x, weight, scale, bias), rtol=1e-5, atol=1e-4)
    assert fp8_linear.fp8_linear(x[:0], weight, scale, bias).shape == (0, 9)


SHARED_MEMORY = {75: 64, 80: 163, 89: 99, 90: 227}
"""KiB that one program may have."""


def compiled(capability, tiles, element, **changes):
    kernel = fp8_linear._fp8_linear_kernel
    native = capability >= 89
    pointers = {"x_ptr": element, "w_ptr": "fp8e4nv" if native else "u8", "scale_ptr": "fp32", "bias_ptr": element}
    pointers |= {"y_ptr": element, "sums_ptr": "fp32", "locks_ptr": "i32"}
    constants = {"SCALES": 0, "HAS_BIAS": False, "NATIVE": native, "EVEN_K": True, "CUT_K": True}
    constants |= {f"BLOCK_{side.upper()}": getattr(tiles, f"block_{side}") for side in "mnk"}
    constants |= {"stride_xk": 1, "stride_wk": 1} | changes
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    sizes = ["M", "N", "K", "parts", "stride_xm", "stride_wn", "stride_sn", "stride_sk", "stride_b"]
    signature |= dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = [*pointers, "N", "K", "stride_xm", "stride_wn"]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(kernel, signature, constants, hints)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=target, options=options)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("tiles", fp8_linear.TILES, ids=lambda tiles: str(tiles.rows))
def test_it_compiles_for_gpus_that_are_not_here(capability, tiles):
    found = compiled(capability, tiles, "fp16" if capability < 80 else "bf16")
    assert found.metadata.shared <= SHARED_MEMORY[capability] * 1024
    assert ("wgmma" in found.asm["ptx"]) == (capability == 90), "Hopper's tensor cores"
    assert ("e4m3x2" in found.asm["ptx"]) == (capability >= 89)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("element", ["fp16", "fp32"])
@pytest.mark.parametrize("scales", [0, 1, 2])
def test_every_variant_compiles(element, scales):
    smallest = fp8_linear.TILES[0]
    compiled(90, smallest, element, SCALES=scales, HAS_BIAS=True, EVEN_K=False, CUT_K=False, BLOCK_K=64)
