"""NF4: dequantized bit for bit as bitsandbytes does, and multiplied while unpacked, against float64."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

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
from posttrain.kernels import nf4, split_k  # noqa: E402 - needs triton

MATRICES = [(3, 1), (9, 41), (41, 341), (64, 192), (130, 300)]
SHAPES = [(1, 9, 64), (3, 70, 192), (8, 33, 1088), (9, 41, 320), (20, 66, 704), (41, 130, 256), (70, 20, 384)]
"""Rows, outputs, inputs: tiles that are not full, a last step that is not whole, sums that are cut into parts."""
if DEVICE == "cuda":
    SHAPES += [(1, 1024, 2560), (8, 2560, 9728), (16, 6144, 2560), (64, 4096, 2560), (128, 2560, 4096)]


def test_under_the_interpreter():
    run_interpreted(__file__, 3 * len(SHAPES) + 2 * len(MATRICES))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_weight(shape, block_size=64, seed=0):
    """Random bits, every nibble among them, and the absmax of each block."""
    total = math.prod(shape)
    bits = torch.randint(0, 256, ((total + 1) // 2, 1), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    absmax = draw(-(-total // block_size), seed=seed + 1).abs() / 10 + 0.01
    return bits.to(DEVICE), absmax.to(DEVICE)


def by_hand(packed, absmax, shape, block_size=64):
    """float64 [O, I], weight by weight."""
    bits, scale = packed.flatten().tolist(), absmax.double().tolist()
    values = []
    for index in range(math.prod(shape)):
        byte = bits[index // 2]
        values.append(reference.NF4_CODE[byte // 16 if index % 2 == 0 else byte % 16] * scale[index // block_size])
    return torch.tensor(values, dtype=torch.float64, device=packed.device).view(shape)


def nested_absmax(count, seed=5):
    """uint8 absmax of blocks, their scales and offset, and the float32 absmax that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (count,), generator=generator).to(torch.uint8)
    code = draw(256, seed=seed).sort().values
    scale = torch.rand(-(-count // 256), generator=generator) / 10
    offset = torch.tensor(0.537)
    plain = torch.empty(count)
    for index in range(count):  # two roundings: of the product and of the sum
        plain[index] = code[int(bits[index])] * scale[index // 256] + offset
    nested = reference.NestedAbsmax(code.to(DEVICE), scale.to(DEVICE), offset.to(DEVICE))
    return bits.to(DEVICE), nested, plain.to(DEVICE)


not_interpreted = pytest.mark.skipif(INTERPRETED, reason="launches nothing")


@not_interpreted
def test_the_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(reference.NF4_CODE), functional.get_4bit_type("nf4", device="cpu"))


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_the_reference_is_bitsandbytes(shape, dtype):
    pytest.importorskip("bitsandbytes")
    packed, absmax = packed_weight(shape)
    found = reference.dequantize_nf4(packed, absmax, shape, dtype)
    assert torch.equal(found, torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", shape, dtype))
    assert torch.equal(found, by_hand(packed, absmax, shape).float().to(dtype))


@not_interpreted
def test_the_reference_of_double_quantization_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = draw(130, 320, seed=3).to(DEVICE)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    nested = reference.NestedAbsmax(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    found = reference.dequantize_nf4(packed, state.absmax, (130, 320), torch.float32, nested=nested)
    assert state.absmax.dtype == torch.uint8 and torch.equal(found, functional.dequantize_4bit(packed, state))


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_dequantized_bit_for_bit(shape, dtype, block_size, filled_with_nan):  # noqa: F811
    packed, absmax = packed_weight(shape, block_size)
    found = nf4.dequantize_nf4(packed, absmax, shape, dtype, block_size=block_size)
    assert found.dtype == dtype and tuple(found.shape) == shape
    assert torch.equal(found, by_hand(packed, absmax, shape, block_size).float().to(dtype))


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (130, 300), (128, 700)], ids=str)
def test_double_quantization_bit_for_bit(shape, dtype, filled_with_nan):  # noqa: F811
    packed, _ = packed_weight(shape)
    bits, nested, plain = nested_absmax(-(-math.prod(shape) // 64))
    found = nf4.dequantize_nf4(packed, bits, shape, dtype, nested=nested)
    assert torch.equal(found, by_hand(packed, plain, shape).float().to(dtype))


@runs
def test_dequantized_into_a_given_tensor():
    packed, absmax = packed_weight((41, 341))
    out = torch.full((41, 341), float("nan"), dtype=torch.float16, device=DEVICE)
    assert nf4.dequantize_nf4(packed, absmax, (41, 341), torch.float16, out=out) is out
    assert torch.equal(out, by_hand(packed, absmax, (41, 341)).float().half())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bitsandbytes_on_the_gpu_gives_the_same_bits(dtype, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = draw(1030, 2560, seed=3).to(DEVICE, dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    outer = None
    if nested:
        outer = reference.NestedAbsmax(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    found = nf4.dequantize_nf4(packed, state.absmax, (1030, 2560), dtype, nested=outer)
    assert torch.equal(found, functional.dequantize_4bit(packed, state))


def problem(shape, dtype, block_size=64):
    """x cut out of a larger one, a packed weight, a bias with gaps, and the product in float64."""
    rows, outputs, inputs = shape
    x = draw(rows, inputs + 3, seed=7)[:, :inputs].to(DEVICE, dtype)
    bias = draw(outputs, 2, seed=8)[:, 0].to(DEVICE, dtype)
    packed, absmax = packed_weight((outputs, inputs), block_size)
    weight = reference.dequantize_nf4(packed, absmax, (outputs, inputs), torch.float64, block_size=block_size)
    return x, packed, absmax, bias, x.double() @ weight.T + bias.double()


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_of_the_product_is_at_most_twice_torchs(shape, dtype, filled_with_nan):  # noqa: F811
    x, packed, absmax, bias, exact = problem(shape, dtype)
    y = nf4.nf4_linear(x, packed, absmax, shape[1:], bias=bias)
    theirs = F.linear(x, reference.dequantize_nf4(packed, absmax, shape[1:], dtype), bias)
    assert y.dtype == dtype and y.shape == exact.shape and y.is_contiguous()
    floor = exact.abs().max().item() * torch.finfo(torch.float32).eps * shape[2] ** 0.5
    assert distance(y, exact) <= 2 * distance(theirs, exact) + floor
    twin = reference.nf4_linear(x, packed, absmax, shape[1:], bias=bias)
    assert distance(twin, exact) <= 2 * distance(theirs, exact) + floor


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_product_sees_the_weight_that_is_dequantized(dtype):
    """One input at a time: sampler and trainer then hold the same weight, bit for bit."""
    shape = (32, 128)
    packed, absmax = packed_weight(shape)
    weight = nf4.dequantize_nf4(packed, absmax, shape, dtype)
    y = nf4.nf4_linear(torch.eye(128, dtype=dtype, device=DEVICE), packed, absmax, shape)
    assert torch.equal(y, weight.T)


@runs
@pytest.mark.parametrize("block_size", [32, 128, 256])
def test_other_block_sizes(block_size):
    shape = (5, 40, 512)
    x, packed, absmax, bias, exact = problem(shape, torch.float32, block_size)
    y = nf4.nf4_linear(x, packed, absmax, shape[1:], block_size=block_size, bias=bias)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@runs
def test_no_bias_and_locks_that_are_used_again(filled_with_nan):  # noqa: F811
    x, packed, absmax, bias, exact = problem((5, 70, 1088), torch.float32)
    locks = torch.zeros(split_k.LOCKS, dtype=torch.int32, device=DEVICE)
    once, twice = (nf4.nf4_linear(x, packed, absmax, (70, 1088), locks=locks) for _ in range(2))
    assert torch.equal(once, twice) and not locks.any()
    torch.testing.assert_close(once.double() + bias.double(), exact, rtol=1e-5, atol=1e-4)


@runs
@pytest.mark.parametrize(("rows", "inputs"), [(nf4.KERNEL_ROWS + 1, 64), (3, 41)])
def test_many_rows_and_rows_that_cut_a_block_are_dequantized(rows, inputs, monkeypatch):
    monkeypatch.setattr(nf4, "_launch", None)
    x, packed, absmax, bias, exact = problem((rows, 9, inputs), torch.float32)
    y = nf4.nf4_linear(x, packed, absmax, (9, inputs), bias=bias)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    assert nf4.nf4_linear(x[:0], packed, absmax, (9, inputs), bias=bias).shape == (0, 9)


def compiled_product(capability, tiles, element, **changes):
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr"), element)
    pointers |= {"w_ptr": "u8", "absmax_ptr": "fp32", "code_ptr": "fp32", "sums_ptr": "fp32", "locks_ptr": "i32"}
    constants = {"HAS_BIAS": False, "SHUFFLE": True, "EVEN_K": True, "CUT_K": True, "BLOCK_SIZE": 64, "stride_xk": 1}
    constants |= {f"BLOCK_{side.upper()}": getattr(tiles, f"block_{side}") for side in "mnk"}
    return compiled(
        nf4._nf4_linear_kernel,
        capability,
        pointers,
        constants | changes,
        aligned=("N", "K", "stride_xm"),
        warps=tiles.warps,
        stages=tiles.stages,
    )


@not_interpreted
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("tiles", nf4.TILES, ids=lambda tiles: str(tiles.rows))
def test_the_product_compiles_and_unpacks_into_the_tensor_cores_operand(capability, tiles):
    found = compiled_product(capability, tiles, "fp16" if capability < 80 else "bf16")
    held, first_use = (found.asm["ptx"].index(text) for text in (".reg .b32 nf4_code", "shfl.sync.idx.b32"))
    assert held < first_use
    unpacked = rf"tensor<{tiles.block_n}x{tiles.block_k}x[bf]+16, #(?!linear|ttg)"
    assert not re.search(rf"local_alloc .*{unpacked}", found.asm["ttgir"]), "weights pass through shared memory"


@not_interpreted
@pytest.mark.parametrize("element", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("block_size", [32, 256])
def test_every_variant_of_the_product_compiles(element, block_size):
    changes = {"BLOCK_K": 64} if element == "fp32" else {}
    compiled_product(
        90, nf4.TILES[0], element, HAS_BIAS=True, EVEN_K=False, CUT_K=False, BLOCK_SIZE=block_size, **changes
    )


@not_interpreted
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("even", [False, True])
def test_the_dequantization_compiles(capability, nested, even):
    element = "fp16" if capability < 80 else "bf16"
    pointers = {"packed_ptr": "u8", "absmax_ptr": "u8" if nested else "fp32", "outer_code_ptr": "fp32"}
    pointers |= {"outer_scale_ptr": "fp32", "offset_ptr": "fp32", "code_ptr": "fp32", "out_ptr": element}
    constants = {"NESTED": nested, "SHUFFLE": True, "EVEN": even, "BLOCKS": 64, "BLOCK_SIZE": 64}
    found = compiled(nf4._dequantize_nf4_kernel, capability, pointers, constants, aligned=("total",))
    if even:
        assert "st.global.v4" in found.asm["ptx"], "sixteen bytes at a time"
