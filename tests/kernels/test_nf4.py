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
from posttrain.kernels import launch, nf4, nf4_codes, split_k  # noqa: E402 - needs triton

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
def test_the_product_sees_a_weight_no_further_off_than_the_rounded_one(dtype):
    """One input at a time: code · absmax, the code within 0.0008 of the largest, rounded once."""
    shape = (32, 128)
    packed, absmax = packed_weight(shape)
    exact = by_hand(packed, absmax, shape)
    y = nf4.nf4_linear(torch.eye(128, dtype=dtype, device=DEVICE), packed, absmax, shape)
    largest = absmax.double().view(32, 2).repeat_interleave(64, dim=1)
    off_by = {torch.float16: 3.5e-4, torch.bfloat16: 8e-4, torch.float32: 0.0}[dtype]
    assert ((y.T.double() - exact).abs() <= off_by * largest + torch.finfo(dtype).eps / 2 * exact.abs() * 1.001).all()


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scaled_codes_are_nearer_than_rounded_weights(dtype):
    codes = torch.tensor(reference.NF4_CODE, dtype=torch.float64)
    scaled = nf4_codes.scaled_codes(torch.device("cpu"), dtype).double() / nf4_codes.SCALE.value
    weights = codes * torch.linspace(0.01, 1, 5000, dtype=torch.float64)[:, None]
    rounded = (weights.to(dtype).double() - weights) / weights[:, :1].abs()
    assert (scaled - codes).square().mean() < rounded.square().mean()


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_nibble_of_a_word_becomes_its_code(dtype):
    """The instructions, executed here: the interpreter does not know them."""
    codes = nf4_codes.scaled_codes(torch.device("cpu"), dtype).view(torch.int16).tolist()
    registers = {"%ctaid.z": 0, "$1": 0}
    execute(nf4_codes._hold_tables(dtype), registers)
    generator = torch.Generator().manual_seed(0)
    words = [index * 0x01010101 for index in range(256)]
    words += torch.randint(0, 2**32, (200,), generator=generator).tolist()
    for word in words:
        execute(nf4_codes._pairs_of_codes(), registers | {"$4": word}, found := {})
        for index in range(4):
            byte = word >> 8 * index & 255
            assert found[f"${index}"] == codes[byte >> 4] & 0xFFFF | (codes[byte & 15] & 0xFFFF) << 16


def execute(instructions, registers, written=None):
    """PTX on 32-bit registers (PTX ISA, section 9.7); ``written``: what is assigned, apart from what was there."""
    values = dict(registers)
    for line in re.sub(r"\.reg[^;]*;|[{}]", "", instructions).split(";"):
        if line.strip():
            name, *operands = re.split(r"[\s,]+", line.strip())
            target, *sources = operands
            a, b, c, table = ([values[text] if text in values else int(text, 0) for text in sources] + [0] * 3)[:4]
            values[target] = {"mov": mov, "shl": shl, "shr": shr, "and": both, "xor": xor, "prmt": prmt, "lop3": lop3}[
                name.split(".")[0]
            ](a, b, c, table)
    (registers if written is None else written).update(values)


def mov(a, *_):
    return a


def shl(a, b, *_):
    return a << b & 0xFFFFFFFF


def shr(a, b, *_):
    return a >> b


def both(a, b, *_):
    return a & b


def xor(a, b, *_):
    return a ^ b


def prmt(a, b, selector, _):
    """Byte i of the result: the byte that the low three bits of nibble i name, or its sign where the fourth is set."""
    result = 0
    for index in range(4):
        nibble = selector >> 4 * index & 15
        byte = (a | b << 32) >> 8 * (nibble & 7) & 255
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * index
    return result


def lop3(a, b, c, table):
    """Bit by bit, the entry of ``table`` that the three bits name."""
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


@runs
@pytest.mark.parametrize("block_size", [32, 128, 256])
def test_other_block_sizes(block_size):
    shape = (5, 40, 512)
    x, packed, absmax, bias, exact = problem(shape, torch.float16, block_size)
    y = nf4.nf4_linear(x, packed, absmax, shape[1:], block_size=block_size, bias=bias)
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=3e-3)


@runs
def test_no_bias_and_locks_that_are_used_again(filled_with_nan):  # noqa: F811
    x, packed, absmax, bias, exact = problem((5, 70, 1088), torch.float16)
    locks = torch.zeros(split_k.LOCKS, dtype=torch.int32, device=DEVICE)
    once, twice = (nf4.nf4_linear(x, packed, absmax, (70, 1088), locks=locks) for _ in range(2))
    assert torch.equal(once, twice) and not locks.any()
    torch.testing.assert_close(once.double() + bias.double(), exact, rtol=1e-3, atol=3e-3)


@runs
@pytest.mark.parametrize(
    ("rows", "inputs", "dtype", "capability"),
    [
        (nf4.KERNEL_ROWS + 1, 64, torch.float16, (9, 0)),
        (3, 41, torch.float16, (9, 0)),
        (3, 64, torch.float32, (9, 0)),
        (3, 64, torch.float16, (7, 5)),
    ],
)
def test_what_the_kernel_does_not_take_is_dequantized(rows, inputs, dtype, capability, monkeypatch):
    """Many rows, rows that cut a block, float32, a GPU whose tensor cores Triton leaves idle."""
    monkeypatch.setattr(nf4, "_launch", None)
    monkeypatch.setattr(nf4, "gpu", lambda device: launch.gpu(device)._replace(capability=capability))
    x, packed, absmax, bias, exact = problem((rows, 9, inputs), dtype)
    y = nf4.nf4_linear(x, packed, absmax, (9, inputs), bias=bias)
    torch.testing.assert_close(
        y.double(), exact, **({"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 3e-3})
    )
    assert nf4.nf4_linear(x[:0], packed, absmax, (9, inputs), bias=bias).shape == (0, 9)


@not_interpreted
@pytest.mark.parametrize(("steps", "most", "parts"), [(32, 13, 11), (40, 8, 8), (5, 9, 5), (7, 0, 1), (152, 16, 16)])
def test_no_part_of_a_sum_is_empty(steps, most, parts):
    assert split_k.even_parts(steps, most) == parts and (parts - 1) * -(-steps // parts) < steps


def compiled_product(capability, tiles, element, **changes):
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr", "code_ptr"), element)
    pointers |= {"w_ptr": "u8", "absmax_ptr": "fp32", "sums_ptr": "fp32", "locks_ptr": "i32"}
    constants = {"HAS_BIAS": False, "PERMUTE": True, "CUT_K": True, "BLOCK_SIZE": 64, "BLOCK_K": 64, "stride_xk": 1}
    constants |= {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "AT_ONCE": tiles.blocks}
    return compiled(
        nf4._nf4_linear_kernel,
        capability,
        pointers,
        constants | changes,
        aligned=("N", "stride_xm", "stride_w"),
        warps=tiles.warps,
        stages=tiles.stages,
    )


@not_interpreted
@pytest.mark.parametrize("capability", [each for each in CAPABILITIES if each >= 80])
@pytest.mark.parametrize("tiles", nf4.TILES, ids=lambda tiles: str(tiles.rows))
def test_the_product_compiles_and_unpacks_into_the_tensor_cores_operand(capability, tiles):
    found = compiled_product(capability, tiles, "bf16")
    held, first_use = (found.asm["ptx"].index(text) for text in (".reg .b32 nf4_<8>", "prmt.b32 below, nf4_0"))
    assert held < first_use and re.search(r"wgmma|mma\.sync", found.asm["ptx"])
    unpacked = rf"tensor<{tiles.block_n}x64x[bf]+16, #(?!linear|ttg)"
    assert not re.search(rf"local_alloc .*{unpacked}", found.asm["ttgir"]), "weights pass through shared memory"
    times = found.asm["ptx"].count("prmt.b32 below, nf4_0,")  # for eight weights, twice
    each_once = tiles.block_n * 64 * tiles.blocks // (tiles.warps * 32) // 8 * 2
    if capability == 90 or tiles.rows <= 32:  # 64 rows are many for the tensor cores before Hopper's
        assert times == each_once, "weights are unpacked twice"


@not_interpreted
@pytest.mark.parametrize("element", ["fp16", "bf16"])
@pytest.mark.parametrize("block_size", [32, 256])
def test_every_variant_of_the_product_compiles(element, block_size):
    changes = {"BLOCK_SIZE": block_size, "BLOCK_K": min(block_size, 64), "AT_ONCE": 2}
    compiled_product(90, nf4.TILES[0], element, HAS_BIAS=True, CUT_K=False, **changes)


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
