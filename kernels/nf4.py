"""NF4 weights (2305.14314) in bitsandbytes' layout: dequantized in one pass, or multiplied while they are unpacked.

Shape letters: M rows of x, O outputs, I inputs; N blocks of weights under one absmax.

A dequantized weight is ``code · absmax`` in float32, rounded to the type of the result: bitsandbytes' numbers, and the
trainer's. The product rounds the codes instead and scales the float32 sum of each block by its absmax: half the
instructions, and nearer to the exact weight than the rounded one is (see ``nf4_codes.SCALE``). Sampler and trainer
differ by less than two roundings of the weight.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.launch import gpu
from posttrain.kernels.nf4_codes import (
    SCALE,
    codes,
    hold_codes_in_registers,
    hold_tables_in_registers,
    looked_up,
    scaled_codes,
    unpacked,
)
from posttrain.kernels.reference.nf4 import NestedAbsmax
from posttrain.kernels.split_k import cut, even_parts, parts_to_fill, store_part, sum_of_parts


class _Tiles(NamedTuple):
    rows: int
    """Up to this many rows of x."""
    block_m: int
    block_n: int
    """Outputs; at least 16 for each warp, so that every warp unpacks weights of its own."""
    blocks: int
    """Of 64 inputs or fewer, under one absmax, between two barriers."""
    warps: int
    stages: int
    programs: int
    """For each multiprocessor: K is cut until there are so many."""


TILES = (
    _Tiles(8, 8, 64, 1, 4, 5, 8),
    _Tiles(16, 16, 64, 1, 2, 5, 8),
    _Tiles(32, 32, 64, 1, 2, 4, 6),
    _Tiles(64, 64, 64, 1, 4, 4, 3),
    _Tiles(128, 128, 128, 1, 8, 3, 1),
)
KERNEL_ROWS = TILES[-1].rows
"""More rows than that go through a dequantized weight and torch's product."""
_MOST_PARTS = 16
_LEAST_BLOCKS = 4
"""Of a part: fewer do not fill the pipeline."""
_BLOCK_K = 64
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
            codes(packed.device),
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
    float32, rows of the weight that cut a block, and GPUs whose tensor cores Triton does not use (below compute
    capability 8.0) go through the dequantized weight.
    """
    outputs, inputs = shape
    assert x.shape[1] == inputs and absmax.dtype == torch.float32, "x [M, I], absmax float32"
    if x.shape[0] == 0:
        return x.new_empty(0, outputs)
    few = x.shape[0] <= KERNEL_ROWS
    if not few or x.element_size() != 2 or inputs % block_size or gpu(x.device).capability < (8, 0):
        return F.linear(x, dequantize_nf4(packed, absmax, shape, x.dtype, block_size=block_size), bias)
    assert packed.numel() * 2 == outputs * inputs and packed.is_contiguous() and absmax.is_contiguous()
    return _launch(x, packed, absmax, block_size, bias, locks)


def _launch(
    x: Tensor, packed: Tensor, absmax: Tensor, block_size: int, bias: Tensor | None, locks: Tensor | None
) -> Tensor:
    (rows, inputs), interpreted = x.shape, gpu(x.device).interpreted
    outputs = packed.numel() * 2 // inputs
    tiles = next(tiles for tiles in TILES if rows <= tiles.rows)
    tiles_m, tiles_n = -(-rows // tiles.block_m), -(-outputs // tiles.block_n)
    block_k = min(block_size, _BLOCK_K)
    blocks = inputs // block_k
    at_once = tiles.blocks if blocks % tiles.blocks == 0 else 1
    most = min(parts_to_fill(x.device, tiles_m * tiles_n, tiles.programs), blocks // _LEAST_BLOCKS, _MOST_PARTS)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    parts = even_parts(blocks // at_once, most)
    parts, sums, locks = cut(y, tiles_m * tiles_n, tiles.block_m * tiles.block_n, parts, locks)
    _nf4_linear_kernel[(tiles_m * tiles_n, parts)](
        x,
        packed,
        absmax,
        scaled_codes(x.device, x.dtype) if interpreted else x,
        x if bias is None else bias,
        y,
        sums,
        locks,
        rows,
        outputs,
        blocks,
        parts,
        *x.stride(),
        inputs // 2,
        inputs // block_size,
        0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        PERMUTE=not interpreted,
        CUT_K=parts > 1,
        BLOCK_SIZE=block_size,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        AT_ONCE=at_once,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y


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
        hold_codes_in_registers()
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
    high = looked_up(wide >> 4, code_ptr, SHUFFLE) * spread
    low = looked_up(wide, code_ptr, SHUFFLE) * spread
    kind = out_ptr.dtype.element_ty
    weights = tl.join(high.to(kind), low.to(kind)).reshape(BLOCKS * BLOCK_SIZE)
    offs_out = first * BLOCK_SIZE + tl.arange(0, BLOCKS * BLOCK_SIZE)
    if EVEN:
        tl.store(out_ptr + offs_out, weights)
    else:
        tl.store(out_ptr + offs_out, weights, mask=offs_out < total)


@triton.jit(do_not_specialize=["M", "blocks", "parts", "stride_absmax"])
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
    blocks: tl.tensor,
    parts: tl.tensor,
    stride_xm: tl.tensor,
    stride_xk: tl.tensor,
    stride_w: tl.tensor,
    stride_absmax: tl.tensor,
    stride_b: tl.tensor,
    HAS_BIAS: tl.constexpr,
    PERMUTE: tl.constexpr,
    CUT_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """One tile of yᵀ, or one part of its sum; ``blocks`` of BLOCK_K inputs each, a multiple of AT_ONCE.

    Neighbours share a tile of the weight: it stays in L2 between them.
    """
    if PERMUTE:
        hold_tables_in_registers(x_ptr.dtype.element_ty)
    tile, part = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    offs_m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_byte = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2)
    mask_m, mask_n = offs_m < M, offs_n < N
    safe_n = tl.where(mask_n, offs_n, 0)  # a row that exists instead of a mask in the loop
    row = safe_n.to(tl.int64)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + offs_k[:, None] * stride_xk
    w_ptrs, absmax_ptrs = w_ptr + row[:, None] * stride_w + offs_byte[None, :], absmax_ptr + row * stride_absmax

    each = tl.cdiv(blocks, parts * AT_ONCE) * AT_ONCE
    end = tl.minimum(part * each + each, blocks)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    scale = tl.load(absmax_ptrs + part * each * BLOCK_K // BLOCK_SIZE)
    for first in range(part * each, end, AT_ONCE):
        for index in tl.static_range(AT_ONCE):
            block = first + index
            x = tl.load(x_ptrs + block * BLOCK_K * stride_xk, mask=mask_m[None, :], other=0.0)
            bits = tl.load(w_ptrs + block * (BLOCK_K // 2))
            # a block ahead: the pipeline holds only what a product reads
            ahead = tl.minimum(block + 1, blocks - 1)
            following = tl.load(absmax_ptrs + ahead * BLOCK_K // BLOCK_SIZE)
            w = unpacked(bits, code_ptr, x.dtype, PERMUTE)
            acc += tl.dot(w, x) * scale[:, None]
            scale = following
    acc *= 1 / SCALE

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
