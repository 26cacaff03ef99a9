"""Linear layer over a float8_e4m3fn weight with 16-bit activations: a Triton kernel for the few rows of decoding.

Shape letters: M rows of x, N outputs, K inputs; S parts that K is cut into.

A decoding step is bound by the bytes of the weight, so each is read once, as fp8, and widened in registers. The weight
is the *left* operand of the tensor cores, ``y ᵀ = W xᵀ``: on Hopper the left one may come from registers, and its side
is 64 at least, while the other side, the few rows of x, may be as small as 16. Where the tiles of y are too few to
occupy the GPU, K is cut into S parts (see ``split_k``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from posttrain.kernels.fp8 import dequantize_fp8, native_e4m3, scale_kind, scale_strides, widened
from posttrain.kernels.launch import gpu
from posttrain.kernels.split_k import cut, even_parts, parts_to_fill, store_part, sum_of_parts

KERNEL_ROWS = 256
"""More rows than that go through a dequantized weight and torch's product. Reading the weight once as fp8 pays while
its bytes are what takes the time: up to about 200 rows on an H200 (990 TFLOP/s ÷ 4.8 TB/s ÷ 1 multiply-add a byte)."""


class _Tiles(NamedTuple):
    rows: int
    """Up to this many rows of x."""
    block_m: int
    block_n: int
    block_k: int
    """Bytes of one weight row that a step reads, ``FP8_BLOCK`` or a divisor of it."""
    warps: int
    stages: int
    programs: int
    """How many fit on a multiprocessor: K is cut until there are so many."""


# About 25 KiB must be under way on each multiprocessor of an H200 to use its bandwidth: several small programs with
# four or five stages each. From 65 rows on, a tile of 128 × 128 reads x from L2 half as often. Each line fits into the
# 99 KiB of shared memory of compute capability 8.9.
TILES = (
    _Tiles(16, 16, 64, 128, 4, 5, 3),
    _Tiles(32, 32, 64, 128, 4, 4, 3),
    _Tiles(64, 64, 64, 128, 4, 3, 2),
    _Tiles(KERNEL_ROWS, 128, 128, 64, 8, 4, 1),
)
_MOST_PARTS = 8
_LEAST_STEPS = 4
"""Of a part: fewer do not fill the pipeline."""


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, locks: Tensor | None = None
) -> Tensor:
    """``x (weight · scale)ᵀ + bias`` [M, N] in x's type, summed in float32 and rounded once; no gradient.

    ``x`` [M, K] in float16, bfloat16 or float32; ``weight`` float8_e4m3fn [N, K]; ``scale`` float32: one number, one a
    row [N] or [N, 1], or one for each square of 128 × 128 weights [⌈N/128⌉, ⌈K/128⌉]; ``bias`` [N]; all of any strides.
    ``locks``: int32 zeros [LOCKS], for calls that follow one another on a stream; made afresh without them.
    """
    assert weight.dtype == torch.float8_e4m3fn and x.shape[1] == weight.shape[1], (
        "x [M, K], weight float8_e4m3fn [N, K]"
    )
    if x.shape[0] > KERNEL_ROWS or gpu(x.device).capability < (8, 0):  # Triton uses no tensor cores below
        return F.linear(x, dequantize_fp8(weight, scale, x.dtype), bias)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    return _launch(x, weight, scale, bias, locks)


def _launch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, locks: Tensor | None) -> Tensor:
    (rows, inputs), outputs = x.shape, weight.shape[0]
    kind = scale_kind(scale, outputs, inputs)
    tiles = next(tiles for tiles in TILES if rows <= tiles.rows)
    block_k = tiles.block_k * 2 // x.element_size()  # float32 takes the room of two
    native = native_e4m3(x.device)
    tiles_m, tiles_n = -(-rows // tiles.block_m), -(-outputs // tiles.block_n)
    steps = -(-inputs // block_k)
    most = min(parts_to_fill(x.device, tiles_m * tiles_n, tiles.programs), steps // _LEAST_STEPS, _MOST_PARTS)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    parts, sums, locks = cut(y, tiles_m * tiles_n, tiles.block_m * tiles.block_n, even_parts(steps, most), locks)
    stride_sn, stride_sk = scale_strides(scale, kind)
    _fp8_linear_kernel[(tiles_m * tiles_n, parts)](
        x,
        weight if native else weight.view(torch.uint8),
        scale,
        x if bias is None else bias,
        y,
        sums,
        locks,
        rows,
        outputs,
        inputs,
        parts,
        *x.stride(),
        *weight.stride(),
        stride_sn,
        stride_sk,
        0 if bias is None else bias.stride(0),
        SCALES=kind,
        HAS_BIAS=bias is not None,
        NATIVE=native,
        EVEN_K=inputs % block_k == 0,
        CUT_K=parts > 1,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y


@triton.jit(do_not_specialize=["M", "parts"])
def _fp8_linear_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
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
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_sn: tl.tensor,
    stride_sk: tl.tensor,
    stride_b: tl.tensor,
    SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    CUT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of yᵀ, or one part of its sum. Neighbours share a tile of the weight: it stays in L2 between them."""
    tile, part = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    start_m, start_n = (tile % tiles_m) * BLOCK_M, (tile // tiles_m) * BLOCK_N
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    safe_n = tl.where(mask_n, offs_n, 0)  # a row that exists instead of a mask in the loop
    x_row, w_row = offs_m.to(tl.int64)[None, :] * stride_xm, safe_n.to(tl.int64)[:, None] * stride_wn

    steps = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(steps, parts)
    first = part * each
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first, tl.minimum(first + each, steps)):
        at_k = step * BLOCK_K + offs_k
        x_ptrs = x_ptr + x_row + at_k[:, None] * stride_xk
        w_ptrs = w_ptr + w_row + at_k[None, :] * stride_wk
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[None, :], other=0.0)
            bits = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=mask_m[None, :] & (at_k < K)[:, None], other=0.0)
            bits = tl.load(w_ptrs, mask=(at_k < K)[None, :], other=0.0)
        w = widened(bits, NATIVE, x.dtype)
        if SCALES == 2:  # one a square
            square = tl.load(scale_ptr + (safe_n // 128) * stride_sn + (step * BLOCK_K // 128) * stride_sk)
            acc += tl.dot(w, x, input_precision="ieee") * square[:, None]
        else:
            acc = tl.dot(w, x, acc, input_precision="ieee")

    last = True
    if CUT_K:
        last = store_part(acc, sums_ptr, locks_ptr, tile, part, parts)
    if last:
        if CUT_K:
            acc = sum_of_parts(acc, sums_ptr, locks_ptr, tile, parts)
        if SCALES == 0:  # one
            acc *= tl.load(scale_ptr)
        if SCALES == 1:  # one a row
            acc *= tl.load(scale_ptr + safe_n * stride_sn)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + safe_n * stride_b).to(tl.float32)[:, None]
        y_ptrs = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])
