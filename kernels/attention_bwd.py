"""The backward kernels of ``attention``: ∂q, and ∂k with ∂v; launched by the file of that name.

Shape letters: T packed tokens, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from posttrain.kernels.attention_fwd import _rows, _store_rows, _tanh, _visible


@triton.jit
def _weights_and_slope(
    s: tl.tensor, lse: tl.tensor, inner: tl.tensor, factor: tl.tensor, SOFTCAP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The softmax's output, and the slope of the score's cap."""
    slope = 1.0
    if SOFTCAP:
        s = _tanh(s * inner)
        slope = 1.0 - s * s
    return tl.exp2(s * factor - lse), slope


@triton.jit
def _dq_over_keys(
    dq: tl.tensor,
    q: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
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
) -> tl.tensor:
    for step in range(first, last):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        tokens = offs_n + tl.where(offs_n < prompt, origin, shift)
        there = None
        if MASKED:
            there = offs_n < context
        k = _rows(k_ptr, tokens, stride_kt, there, HEAD_DIM, BLOCK_D)
        v = _rows(v_ptr, tokens, stride_vt, there, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p, slope = _weights_and_slope(s, lse[:, None], inner, factor, SOFTCAP)
        if MASKED:
            p = tl.where(_visible(offs_m[:, None], offs_n[None, :], window, WINDOW), p, 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["T", "window"])
def _attention_bwd_dq_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dq_ptr: tl.tensor,
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
    scale: tl.tensor,
    stride_gt: tl.tensor,
    stride_gn: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A block of queries of one head; also leaves delta, the sum of each row of output · gradient."""
    block, head = blocks_ptr + tl.program_id(0) * 5, tl.program_id(1).to(tl.int64)
    start, rows, position = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    origin, prompt = tl.load(block + 3), tl.load(block + 4)
    index = tl.arange(0, BLOCK_M)
    tokens, mask_m, offs_m = start + index, index < rows, position + index
    grad = _rows(grad_ptr + head * stride_gn, tokens, stride_gt, mask_m, HEAD_DIM, BLOCK_D)
    out = _rows(out_ptr + head * HEAD_DIM, tokens, N * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    at = head * T + tokens
    tl.store(delta_ptr + at, delta, mask=mask_m)
    lse = tl.load(lse_ptr + at, mask=mask_m, other=float("inf"))
    q = _rows(q_ptr + head * stride_qn, tokens, stride_qt, mask_m, HEAD_DIM, BLOCK_D)
    kv_head = head // (N // K)
    k_ptr += kv_head * stride_kn
    v_ptr += kv_head * stride_vn

    context, shift = position + rows, start - position
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    first, last = 0, tl.cdiv(context, BLOCK_N)
    if WINDOW:
        first = tl.maximum(position + 1 - window, 0) // BLOCK_N
    else:
        whole = (position + 1) // BLOCK_N
        dq = _dq_over_keys(
            dq, q, grad, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, first, whole, offs_m, context, origin, prompt,
            shift, window, inner, factor, False, HEAD_DIM, WINDOW, SOFTCAP, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        first = whole
    dq = _dq_over_keys(
        dq, q, grad, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, first, last, offs_m, context, origin, prompt,
        shift, window, inner, factor, True, HEAD_DIM, WINDOW, SOFTCAP, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    _store_rows(dq_ptr + head * HEAD_DIM, tokens, N * HEAD_DIM, mask_m, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_over_queries(
    dk: tl.tensor,
    dv: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    stride_qt: tl.tensor,
    stride_qn: tl.tensor,
    stride_gt: tl.tensor,
    stride_gn: tl.tensor,
    T: tl.tensor,
    heads: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    position: tl.tensor,
    offs_n: tl.tensor,
    window: tl.tensor,
    inner: tl.tensor,
    factor: tl.tensor,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Blocks ``first`` to ``last`` of the queries from token ``start`` on, of each head in turn: one loop, so that the
    pipeline does not run dry between heads."""
    each = tl.maximum(last - first, 1)
    for step in range(0, (last - first) * heads):
        head = (step // each).to(tl.int64)
        index = (first + step % each) * BLOCK_M + tl.arange(0, BLOCK_M)
        tokens, offs_m = start + index, position + index
        mask_m = tokens < end
        q = _rows(q_ptr + head * stride_qn, tokens, stride_qt, mask_m, HEAD_DIM, BLOCK_D)
        grad = _rows(grad_ptr + head * stride_gn, tokens, stride_gt, mask_m, HEAD_DIM, BLOCK_D)
        at = head * T + tokens
        lse = tl.load(lse_ptr + at, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=mask_m, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        p, slope = _weights_and_slope(s, lse[None, :], inner, factor, SOFTCAP)
        if MASKED:
            p = tl.where(_visible(offs_m[None, :], offs_n[:, None], window, WINDOW), p, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        ds = p * (dp - delta[None, :]) * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["T", "window", "parts"])
def _attention_bwd_dkdv_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    visits_ptr: tl.tensor,
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
    scale: tl.tensor,
    stride_gt: tl.tensor,
    stride_gn: tl.tensor,
    parts: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A block of keys of one head, for one part of the query heads that read it; parts are added up by the caller."""
    block, program = blocks_ptr + tl.program_id(0) * 5, tl.program_id(1).to(tl.int64)
    kv_head, part = program % K, program // K
    start, rows, position = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    index = tl.arange(0, BLOCK_N)
    tokens, mask_n, offs_n = start + index, index < rows, position + index
    k = _rows(k_ptr + kv_head * stride_kn, tokens, stride_kt, mask_n, HEAD_DIM, BLOCK_D)
    v = _rows(v_ptr + kv_head * stride_vn, tokens, stride_vt, mask_n, HEAD_DIM, BLOCK_D)
    heads = N // K // parts
    first_head = kv_head * (N // K) + part * heads
    q_ptr += first_head * stride_qn
    grad_ptr += first_head * stride_gn
    lse_ptr += first_head * T
    delta_ptr += first_head * T

    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for visit in range(tl.load(block + 3), tl.load(block + 4)):
        seen_by = visits_ptr + visit * 3
        q_start, q_end, q_position = tl.load(seen_by), tl.load(seen_by + 1), tl.load(seen_by + 2)
        count = tl.cdiv(q_end - q_start, BLOCK_M)
        masked = count
        if not WINDOW:
            masked = tl.minimum(count, tl.cdiv(rows - 1, BLOCK_M))  # the queries behind see every key of the block
        dk, dv = _dkdv_over_queries(
            dk, dv, k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, stride_qt, stride_qn, stride_gt, stride_gn, T, heads,
            0, masked, q_start, q_end, q_position, offs_n, window, inner, factor, True,
            HEAD_DIM, WINDOW, SOFTCAP, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if not WINDOW:
            dk, dv = _dkdv_over_queries(
                dk, dv, k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, stride_qt, stride_qn, stride_gt, stride_gn, T, heads,
                masked, count, q_start, q_end, q_position, offs_n, window, inner, factor, False,
                HEAD_DIM, WINDOW, SOFTCAP, BLOCK_M, BLOCK_D,
            )  # fmt: skip
    out = (part * T * K + kv_head) * HEAD_DIM
    _store_rows(dk_ptr + out, tokens, K * HEAD_DIM, mask_n, dk * scale, HEAD_DIM, BLOCK_D)
    _store_rows(dv_ptr + out, tokens, K * HEAD_DIM, mask_n, dv, HEAD_DIM, BLOCK_D)
