"""NF4 codes in registers, and how nibbles become codes; on the host, where the interpreter refuses PTX, from a table.

Dequantizing looks up float32 codes, which lie in the registers of a half-warp, one in each thread, by a shuffle, which
itself drops the bits above a nibble. The product looks up 16-bit codes, eight at a time, by permuting the bytes of
eight registers: 2.6 instructions a weight, none of which crosses threads.
"""

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.reference.nf4 import NF4_CODE

SCALE = tl.constexpr(1.2421)
"""Times this, the codes are nearly 16-bit numbers: off by 0.00040 of the largest in bfloat16 and 0.00005 in float16
(root mean square). Weights rounded one by one, each block of them under another absmax, are off by twice as much."""


@functools.cache
def codes(device: torch.device) -> Tensor:
    """float32 [16]; read by the interpreter only."""
    return torch.tensor(NF4_CODE, device=device)


@functools.cache
def scaled_codes(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[16], as the product rounds them; read by the interpreter only."""
    return (torch.tensor(NF4_CODE, dtype=torch.float64) * SCALE.value).to(device, dtype)


def _hold_codes() -> str:
    """PTX that declares ``nf4_code``, a register, and gives each thread of a half-warp its code: thread i that of i."""
    bits = [struct.unpack("<I", struct.pack("<f", code))[0] for code in NF4_CODE]
    chosen = " ".join(
        f"setp.eq.u32 mine, lane, {index}; selp.b32 nf4_code, {value:#x}, nf4_code, mine;"
        for index, value in enumerate(bits)
    )
    return (
        ".reg .b32 nf4_code; mov.b32 nf4_code, 0; mov.b32 $0, $1; "
        "{ .reg .u32 lane; .reg .pred mine; mov.u32 lane, %laneid; and.b32 lane, lane, 15; " + chosen + " }"
    )


_HOLD_CODES = tl.constexpr(_hold_codes())
# The registers are names in PTX and no tensors, which the compiler could move between threads or to shared memory.
# Lanes 0 to 15 and 16 to 31 among themselves; of the index only the low four bits count.
_LOOK_UP = tl.constexpr("shfl.sync.idx.b32 $0, nf4_code, $1, 0x101f, 0xffffffff;")


@triton.jit
def hold_codes_in_registers() -> None:
    """Before the first ``looked_up``, once in a kernel."""
    tl.inline_asm_elementwise(_HOLD_CODES, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def looked_up(nibble: tl.tensor, code_ptr: tl.tensor, SHUFFLE: tl.constexpr) -> tl.tensor:
    """float32 codes of uint32 whose low four bits are the index."""
    if SHUFFLE:
        bits = tl.inline_asm_elementwise(_LOOK_UP, "=r,r", [nibble], dtype=tl.uint32, is_pure=True, pack=1)
        return bits.to(tl.float32, bitcast=True)
    else:
        return tl.load(code_ptr + (nibble & 15))


def _hold_tables(dtype: torch.dtype) -> str:
    """PTX that declares registers ``nf4_0`` to ``nf4_7``: the low bytes of all 16 scaled codes, then the high ones."""
    bits = (torch.tensor(NF4_CODE, dtype=torch.float64) * SCALE.value).to(dtype).view(torch.int16).tolist()
    words = [
        sum((bits[first + index] >> shift & 255) << 8 * index for index in range(4))
        for shift in (0, 8)
        for first in (0, 4, 8, 12)
    ]
    # a number the assembler cannot know to be 0: what it knows, it would move to a register before each use
    opaque = "mov.b32 $0, $1; .reg .b32 nf4_zero; mov.u32 nf4_zero, %ctaid.z; .reg .b32 nf4_<8>; "
    return opaque + " ".join(f"xor.b32 nf4_{index}, nf4_zero, {word:#x};" for index, word in enumerate(words))


def _pairs_of_codes() -> str:
    """PTX: the codes of the eight nibbles of $4; of each byte a pair of 16 bits, in $0 to $3, its high nibble first.

    ``prmt`` picks four bytes out of eight by the low three bits of four nibbles: the low and the high bytes of the
    codes apart, from the first and from the last eight, of which ``lop3`` takes those that the fourth bits say.
    """
    lines = [
        "{ .reg .b32 shifted, index, last, below, above, low, high;",
        "shl.b32 shifted, $4, 4; and.b32 index, $4, 0x77777777;",
    ]
    for pair, signs in ((0, 0xD9C8), (2, 0xFBEA)):  # the fourth bits of two bytes as signs, low nibbles first
        lines.append(f"prmt.b32 last, shifted, $4, {signs:#x};")
        for name, table in (("low", 0), ("high", 4)):
            lines.append(f"prmt.b32 below, nf4_{table}, nf4_{table + 1}, index;")
            lines.append(f"prmt.b32 above, nf4_{table + 2}, nf4_{table + 3}, index;")
            lines.append(f"lop3.b32 {name}, below, above, last, 0xD8;")
        lines += [f"prmt.b32 ${pair}, low, high, 0x4051;", f"prmt.b32 ${pair + 1}, low, high, 0x6273;"]
        lines.append("shr.u32 index, index, 16;" if pair == 0 else "}")
    return " ".join(lines)


_HOLD_BFLOAT16 = tl.constexpr(_hold_tables(torch.bfloat16))
_HOLD_FLOAT16 = tl.constexpr(_hold_tables(torch.float16))
_PAIRS = tl.constexpr(_pairs_of_codes())


@triton.jit
def hold_tables_in_registers(kind: tl.constexpr) -> None:
    """Before the first ``unpacked``, once in a kernel."""
    if kind == tl.float16:
        tl.inline_asm_elementwise(_HOLD_FLOAT16, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.inline_asm_elementwise(_HOLD_BFLOAT16, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def unpacked(bits: tl.tensor, code_ptr: tl.tensor, kind: tl.constexpr, PERMUTE: tl.constexpr) -> tl.tensor:
    """Codes, scaled by ``SCALE``, of bytes [A, B]: [A, 2B]."""
    if PERMUTE:
        pair = tl.inline_asm_elementwise(_PAIRS, "=&r,=&r,=&r,=&r,r", [bits], tl.uint32, is_pure=True, pack=4)
        first, second = pair.to(tl.uint16).to(kind, bitcast=True), (pair >> 16).to(tl.uint16).to(kind, bitcast=True)
    else:
        index = bits.to(tl.uint32)
        first, second = tl.load(code_ptr + (index >> 4)), tl.load(code_ptr + (index & 15))
    return tl.join(first, second).reshape(bits.shape[0], 2 * bits.shape[1])
