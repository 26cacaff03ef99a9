"""NF4 weights (2305.14314) in bitsandbytes' layout: dequantized in one pass, or multiplied while they are unpacked.

Shape letters: M rows of x, O outputs, I inputs; N blocks of weights under one absmax.

A weight is ``code · absmax`` in float32, rounded to the type of the result, in the product as in the dequantized
matrix: the sampler, which multiplies few rows by the packed weight, and the trainer, which multiplies many by the
dequantized one, run the same policy.

The 16 codes lie in the registers of a half-warp, one in each thread, and a nibble is looked up by a shuffle, which
itself drops the bits above it: about five instructions a weight in all, a fifth of them shuffles.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.launch import gpu
from posttrain.kernels.reference.nf4 import NF4_CODE, NestedAbsmax
from posttrain.kernels.split_k import cut, parts_to_fill, store_part, sum_of_parts


class _Tiles(NamedTuple):
    rows: int
    """Up to this many rows of x."""
    block_m: int
    block_n: int
    """Outputs; at least 16 for each warp, so that every warp unpacks weights of its own."""
    block_k: int
    warps: int
    stages: int
    programs: int
    """For each multiprocessor: K is cut until there are so many."""


TILES = (
    _Tiles(8, 8, 32, 128, 2, 5, 8),
    _Tiles(16, 16, 32, 128, 2, 5, 8),
    _Tiles(32, 32, 64, 128, 4, 4, 4),
    _Tiles(64, 64, 64, 128, 4, 4, 3),
    _Tiles(128, 128, 64, 64, 4, 4, 2),
)
KERNEL_ROWS = TILES[-1].rows
"""More rows than that go through a dequantized weight and torch's product."""
_MOST_PARTS = 16
_LEAST_STEPS = 2
DEQUANTIZED_AT_ONCE = 4096
"""Weights of one program of the dequantizing kernel."""
DEQUANTIZE_WARPS = 4


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    block_size: int = 64,
    nested: NestedAbsmax | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[O, I] = ``shape``, into ``out`` where it is given (contiguous); bit for bit as bitsandbytes' CUDA kernel.

    ``packed`` uint8 of ⌈OI/2⌉ elements; ``absmax`` [N] float32, or uint8 with ``nested``; ``block_size`` a power of 2.
    """
    total = math.prod(shape)
    assert packed.dtype == torch.uint8 and packed.numel() == (total + 1) // 2 and packed.is_contiguous()
    assert absmax.numel() == -(-total // block_size) and absmax.dtype == (
        torch.float32 if nested is None else torch.uint8
    )
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    assert out.is_contiguous() and tuple(out.shape) == tuple(shape) and out.dtype == dtype
    if total:
        blocks = max(1, DEQUANTIZED_AT_ONCE // block_size)
        outer = NestedAbsmax(absmax, absmax, absmax) if nested is None else nested
        _dequantize_nf4_kernel[(triton.cdiv(total, blocks * block_size),)](
            packed,
            absmax,
            outer.code,
            outer.scale,
            outer.offset,
            _codes(packed.device),
            out,
            total,
            NESTED=0 if nested is None else nested.block_size,
            SHUFFLE=not gpu(packed.device).interpreted,
            EVEN=total % (blocks * block_size) == 0,
            BLOCKS=blocks,
            BLOCK_SIZE=block_size,
            num_warps=DEQUANTIZE_WARPS,
            enable_fp_fusion=False,  # bitsandbytes rounds the product of a nested absmax before it adds the offset
        )
    return out


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    *,
    block_size: int = 64,
    bias: Tensor | None = None,
    locks: Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + bias`` [M, O] in x's type, summed in float32 and rounded once; no gradient.

    ``x`` [M, I] of any strides, float16, bfloat16 or float32; the weight as in ``dequantize_nf4``; ``bias`` [O].
    ``locks``: int32 zeros [LOCKS], for calls that follow one another on a stream; made afresh without them. Many rows,
    and rows of the weight that cut a block, go through the dequantized weight.
    """
    outputs, inputs = shape
    assert x.shape[1] == inputs and absmax.dtype == torch.float32, "x [M, I], absmax float32"
    if x.shape[0] == 0:
        return x.new_empty(0, outputs)
    if x.shape[0] > KERNEL_ROWS or inputs % block_size:
        return F.linear(x, dequantize_nf4(packed, absmax, shape, x.dtype, block_size=block_size), bias)
    assert packed.numel() * 2 == outputs * inputs and packed.is_contiguous() and absmax.is_contiguous()
    return _launch(x, packed, absmax, block_size, bias, locks)


def _launch(
    x: Tensor, packed: Tensor, absmax: Tensor, block_size: int, bias: Tensor | None, locks: Tensor | None
) -> Tensor:
    rows, inputs = x.shape
    outputs = packed.numel() * 2 // inputs
    tiles = next(tiles for tiles in TILES if rows <= tiles.rows)
    block_k = tiles.block_k * 2 // x.element_size()  # float32 takes the room of two
    tiles_m, tiles_n = -(-rows // tiles.block_m), -(-outputs // tiles.block_n)
    steps = -(-inputs // block_k)
    most = min(parts_to_fill(x.device, tiles_m * tiles_n, tiles.programs), steps // _LEAST_STEPS, _MOST_PARTS)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    parts, sums, locks = cut(y, tiles_m * tiles_n, tiles.block_m * tiles.block_n, most, locks)
    _nf4_linear_kernel[(tiles_m * tiles_n, parts)](
        x,
        packed,
        absmax,
        _codes(x.device),
        x if bias is None else bias,
        y,
        sums,
        locks,
        rows,
        outputs,
        inputs,
        parts,
        *x.stride(),
        0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        SHUFFLE=not gpu(x.device).interpreted,
        EVEN_K=inputs % block_k == 0,
        CUT_K=parts > 1,
        BLOCK_SIZE=block_size,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y


@functools.cache
def _codes(device: torch.device) -> Tensor:
    """float32 [16]; read by the interpreter only."""
    return torch.tensor(NF4_CODE, device=device)


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


# The register is a name in PTX and no tensor: the compiler may move what it knows of between threads, and it unpacks
# weights in the layout of the tensor cores' operand (instead of passing 16-bit weights through shared memory) only
# where they follow from loaded values alone.
_HOLD_CODES = tl.constexpr(_hold_codes())
# Lanes 0 to 15 and 16 to 31 among themselves; of the index only the low four bits count.
_LOOK_UP = tl.constexpr("shfl.sync.idx.b32 $0, nf4_code, $1, 0x101f, 0xffffffff;")


@triton.jit
def _hold_codes_in_registers() -> None:
    """Before the first ``_looked_up``, once in a kernel."""
    tl.inline_asm_elementwise(_HOLD_CODES, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _looked_up(nibble: tl.tensor, code_ptr: tl.tensor, SHUFFLE: tl.constexpr) -> tl.tensor:
    """float32 codes of uint32 whose low four bits are the index."""
    if SHUFFLE:
        bits = tl.inline_asm_elementwise(_LOOK_UP, "=r,r", [nibble], dtype=tl.uint32, is_pure=True, pack=1)
        return bits.to(tl.float32, bitcast=True)
    else:
        return tl.load(code_ptr + (nibble & 15))


@triton.jit
def _dequantize_nf4_kernel(
    packed_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    outer_code_ptr: tl.tensor,
    outer_scale_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    code_ptr: tl.tensor,
    out_ptr: tl.tensor,
    total: tl.tensor,
    NESTED: tl.constexpr,
    SHUFFLE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """BLOCKS blocks of the flat matrix; NESTED: how many absmax share a scale, 0: they are float32."""
    if SHUFFLE:
        _hold_codes_in_registers()
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    offs_block = first + tl.arange(0, BLOCKS)
    offs_byte = first * (BLOCK_SIZE // 2) + tl.arange(0, BLOCKS * BLOCK_SIZE // 2)
    mask_block, mask_byte = offs_block * BLOCK_SIZE < total, offs_byte * 2 < total
    if EVEN:
        absmax, bits = tl.load(absmax_ptr + offs_block), tl.load(packed_ptr + offs_byte)
    else:
        absmax = tl.load(absmax_ptr + offs_block, mask=mask_block, other=0)
        bits = tl.load(packed_ptr + offs_byte, mask=mask_byte, other=0)
    if NESTED:
        scale = tl.load(outer_scale_ptr + offs_block // NESTED, mask=mask_block, other=0.0)
        absmax = tl.load(outer_code_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr)
    wide = bits.to(tl.uint32)
    spread = tl.broadcast_to(absmax[:, None], (BLOCKS, BLOCK_SIZE // 2)).reshape(BLOCKS * BLOCK_SIZE // 2)
    high = _looked_up(wide >> 4, code_ptr, SHUFFLE) * spread
    low = _looked_up(wide, code_ptr, SHUFFLE) * spread
    kind = out_ptr.dtype.element_ty
    weights = tl.join(high.to(kind), low.to(kind)).reshape(BLOCKS * BLOCK_SIZE)
    offs_out = first * BLOCK_SIZE + tl.arange(0, BLOCKS * BLOCK_SIZE)
    if EVEN:
        tl.store(out_ptr + offs_out, weights)
    else:
        tl.store(out_ptr + offs_out, weights, mask=offs_out < total)


@triton.jit(do_not_specialize=["M", "parts"])
def _nf4_linear_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    code_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    locks_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    parts: tl.tensor,
    stride_xm: tl.tensor,
    stride_xk: tl.tensor,
    stride_b: tl.tensor,
    HAS_BIAS: tl.constexpr,
    SHUFFLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    CUT_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of yᵀ, or one part of its sum. Neighbours share a tile of the weight: it stays in L2 between them."""
    if SHUFFLE:
        _hold_codes_in_registers()
    tile, part = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    offs_m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    SPAN: tl.constexpr = BLOCK_SIZE if BLOCK_SIZE < BLOCK_K else BLOCK_K  # weights of one row under one absmax
    SPANS: tl.constexpr = BLOCK_K // SPAN
    offs_k, offs_byte, offs_span = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2), tl.arange(0, SPANS)
    mask_m, mask_n = offs_m < M, offs_n < N
    safe_n = tl.where(mask_n, offs_n, 0)  # a row that exists instead of a mask in the loop
    x_row, row = offs_m.to(tl.int64)[None, :] * stride_xm, safe_n.to(tl.int64)[:, None]

    steps = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(steps, parts)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(part * each, tl.minimum(part * each + each, steps)):
        at_k, at_byte = step * BLOCK_K + offs_k, step * (BLOCK_K // 2) + offs_byte
        at_span = step * BLOCK_K + offs_span * SPAN
        x_ptrs = x_ptr + x_row + at_k[:, None] * stride_xk
        w_ptrs = w_ptr + row * (K // 2) + at_byte[None, :]
        absmax_ptrs = absmax_ptr + row * (K // BLOCK_SIZE) + (at_span // BLOCK_SIZE)[None, :]
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[None, :], other=0.0)
            bits, absmax = tl.load(w_ptrs), tl.load(absmax_ptrs)
        else:
            x = tl.load(x_ptrs, mask=mask_m[None, :] & (at_k < K)[:, None], other=0.0)
            bits = tl.load(w_ptrs, mask=(at_byte < K // 2)[None, :], other=0)
            absmax = tl.load(absmax_ptrs, mask=(at_span < K)[None, :], other=0.0)
        wide = bits.to(tl.uint32)
        spread = tl.broadcast_to(absmax[:, :, None], (BLOCK_N, SPANS, SPAN // 2)).reshape(BLOCK_N, BLOCK_K // 2)
        high = _looked_up(wide >> 4, code_ptr, SHUFFLE) * spread
        low = _looked_up(wide, code_ptr, SHUFFLE) * spread
        w = tl.join(high.to(x.dtype), low.to(x.dtype)).reshape(BLOCK_N, BLOCK_K)
        acc = tl.dot(w, x, acc, input_precision="ieee")

    last = True
    if CUT_K:
        last = store_part(acc, sums_ptr, locks_ptr, tile, part, parts)
    if last:
        if CUT_K:
            acc = sum_of_parts(acc, sums_ptr, locks_ptr, tile, parts)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + safe_n * stride_b).to(tl.float32)[:, None]
        y_ptrs = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])
