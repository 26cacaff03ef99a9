"""The forward kernel of ``attention``, and what the backward kernels share with it; launched by the file of that name.

Shape letters: T packed tokens, N query heads, K key/value heads, D head dim. Positions count from the first key that a
segment sees: its prompt's tokens, then its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))  # 2 / ln 2


@triton.jit
def _rows(
    ptr: tl.tensor, tokens: tl.tensor, stride: tl.tensor, mask: tl.tensor, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """[tokens, BLOCK_D], zeros where there is nothing; ``mask`` None: all tokens are there."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + tokens.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if HEAD_DIM == BLOCK_D:
        if mask is None:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=mask[:, None], other=0.0)
    else:
        inside = (offs_d < HEAD_DIM)[None, :]
        if mask is None:
            return tl.load(ptrs, mask=inside, other=0.0)
        else:
            return tl.load(ptrs, mask=mask[:, None] & inside, other=0.0)


@triton.jit
def _store_rows(
    ptr: tl.tensor,
    tokens: tl.tensor,
    stride: tl.tensor,
    mask: tl.tensor,
    values: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + tokens.to(tl.int64)[:, None] * stride + offs_d[None, :]
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def _visible(position_q: tl.tensor, position_k: tl.tensor, window: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """Positions that broadcast against each other."""
    seen = position_k <= position_q
    if WINDOW:
        seen &= position_q - position_k < window
    return seen


@triton.jit
def _over_keys(
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    stride_kt: tl.tensor,
    stride_vt: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    offs_m: tl.tensor,
    context: tl.tensor,
    origin: tl.tensor,
    prompt: tl.tensor,
    shift: tl.tensor,
    window: tl.tensor,
    inner: tl.tensor,
    factor: tl.tensor,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Blocks ``first`` to ``last`` of the keys: the sums so far, relative to 2 to the power of ``top``."""
    for step in range(first, last):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        tokens = offs_n + tl.where(offs_n < prompt, origin, shift)
        there = None
        if MASKED:
            there = offs_n < context
        k = _rows(k_ptr, tokens, stride_kt, there, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            s = _tanh(s * inner)
        if MASKED:
            s = tl.where(_visible(offs_m[:, None], offs_n[None, :], window, WINDOW), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * factor)
        p = tl.exp2(s * factor - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc *= shrink[:, None]
        v = _rows(v_ptr, tokens, stride_vt, there, HEAD_DIM, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["T", "window"])
def _attention_fwd_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    window: tl.tensor,
    inner: tl.tensor,
    factor: tl.tensor,
    stride_qt: tl.tensor,
    stride_qn: tl.tensor,
    stride_kt: tl.tensor,
    stride_kn: tl.tensor,
    stride_vt: tl.tensor,
    stride_vn: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A block of queries of one head."""
    block, head = blocks_ptr + tl.program_id(0) * 5, tl.program_id(1).to(tl.int64)
    start, rows, position = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    origin, prompt = tl.load(block + 3), tl.load(block + 4)
    index = tl.arange(0, BLOCK_M)
    tokens, mask_m, offs_m = start + index, index < rows, position + index
    q = _rows(q_ptr + head * stride_qn, tokens, stride_qt, mask_m, HEAD_DIM, BLOCK_D)
    kv_head = head // (N // K)
    k_ptr += kv_head * stride_kn
    v_ptr += kv_head * stride_vn

    context, shift = position + rows, start - position
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), -1e30, dtype=tl.float32)  # below every score, and no infinity to subtract from another
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first, last = 0, tl.cdiv(context, BLOCK_N)
    if WINDOW:
        first = tl.maximum(position + 1 - window, 0) // BLOCK_N
    else:
        whole = (position + 1) // BLOCK_N  # all rows see these
        acc, top, total = _over_keys(
            acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, first, whole, offs_m, context, origin, prompt,
            shift, window, inner, factor, False, HEAD_DIM, WINDOW, SOFTCAP, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        first = whole
    acc, top, total = _over_keys(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, first, last, offs_m, context, origin, prompt,
        shift, window, inner, factor, True, HEAD_DIM, WINDOW, SOFTCAP, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    total = tl.where(mask_m, total, 1.0)  # behind the segment's end a row may see nothing
    _store_rows(out_ptr + head * HEAD_DIM, tokens, N * HEAD_DIM, mask_m, acc / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + head * T + tokens, top + tl.log2(total), mask=mask_m)
