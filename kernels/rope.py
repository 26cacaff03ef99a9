"""Rotary position embedding of q and k in one launch, alone or after an RMS norm of each head.

Shape letters: T packed tokens, N query heads, K key heads, D head dim, R rotated dims, the first of D.

Bound by memory: a program reads all heads of a token once and writes them once. Whole heads are in registers there, so
a norm before the rotation costs no traffic, and its backward keeps q and k alone. The backward of the rotation is the
same kernel with the angles negated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.kernels.launch import gpu, power_of_2
from posttrain.kernels.rope_kernels import norm_rope_bwd_kernel, rope_fwd_kernel


class _Tiles(NamedTuple):
    elements: int
    """Of a tile, at most: heads of one token."""
    per_thread: int
    """Elements of each tensor that a thread holds."""


FORWARD = _Tiles(4096, 32)
NORM_BACKWARD = _Tiles(4096, 32)
PROGRAMS = 4
"""On a multiprocessor, where the weights' gradients are summed: each walks over its share of the tokens."""


class _Rotation(NamedTuple):
    cos: Tensor
    sin: Tensor
    interleaved: bool
    inverse: bool = False


class _Norm(NamedTuple):
    q_weight: Tensor
    k_weight: Tensor
    eps: float
    offset: float


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """q [T, N, D] and k [T, K, D] with their first R dims rotated in pairs, computed in float32 and rounded once.

    ``cos`` and ``sin`` [T, R], any type, hold a pair's angle at both of its columns: i and i + R/2 (Llama: two equal
    halves), or, ``interleaved``, 2i and 2i + 1 (GPT-J, Cohere: every angle twice in a row; of transformers' GLM, Helium
    and ERNIE, whose tables are two equal halves, ``cos[:, : R // 2].repeat_interleave(2, 1)``). One of the two is read.
    q and k may have any strides; results are contiguous.
    """
    return _Rope.apply(q, k, _Rotation(cos, sin, interleaved))


def norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    offset: float = 0.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rope`` of the RMS norm of each head times ``weight + offset`` [D] (Qwen3; Gemma 3 with offset 1.0)."""
    return _NormRope.apply(q, k, q_weight, k_weight, (eps, offset), _Rotation(cos, sin, interleaved))


def rope_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """``rope``, or with ``inverse`` its backward, written over q and k; no gradient.

    For q and k that are the caller's own: autograd must not have saved them, and a gradient that autograd handed over
    may be someone else's too, which is why ``rope`` itself never does this.
    """
    assert q.stride(-1) == 1 and k.stride(-1) == 1, "the last dim of q and k is contiguous"
    both = q, k
    _launch(both, both, _Rotation(cos, sin, interleaved, inverse), None)
    return both


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, rotation: _Rotation) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rotation.cos, rotation.sin)
        ctx.interleaved = rotation.interleaved
        outputs = _outputs(q, k)
        _launch((q, k), outputs, rotation, None)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grads = _outputs(grad_q, grad_k)
        _launch((grad_q, grad_k), grads, _Rotation(cos, sin, ctx.interleaved, inverse=True), None)
        return *grads, None


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        constants: tuple[float, float],
        rotation: _Rotation,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, q_weight, k_weight, rotation.cos, rotation.sin)
        ctx.constants, ctx.interleaved = constants, rotation.interleaved
        outputs = _outputs(q, k)
        _launch((q, k), outputs, rotation, _Norm(q_weight, k_weight, *constants))
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        rotation, norm = _Rotation(cos, sin, ctx.interleaved), _Norm(q_weight, k_weight, *ctx.constants)
        wanted = ctx.needs_input_grad[2:4]
        grads = _outputs(q, k)
        sums = _launch_norm_backward((grad_q, grad_k), (q, k), grads, rotation, norm, any(wanted))
        of_weights = (
            total.to(weight.dtype) if want else None
            for total, weight, want in zip(sums, (q_weight, k_weight), wanted, strict=True)
        )
        return *grads, *of_weights, None, None


def _outputs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous, whatever q and k are."""
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


def _launch(
    inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], rotation: _Rotation, norm: _Norm | None
) -> None:
    q, k = (_dense(x) for x in inputs)
    cos, sin = _dense(rotation.cos), _dense(rotation.sin)
    blocks, warps = _blocks(q, k, cos, FORWARD)
    if outputs is inputs:
        blocks["REST"] = 0  # what is not rotated is where it belongs
    rope_fwd_kernel[(q.shape[0],)](
        q,
        k,
        outputs[0],
        outputs[1],
        cos,
        sin,
        q if norm is None else norm.q_weight.contiguous(),
        q if norm is None else norm.k_weight.contiguous(),
        *q.stride()[:2],
        *k.stride()[:2],
        *outputs[0].stride()[:2],
        *outputs[1].stride()[:2],
        cos.stride(0),
        sin.stride(0),
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.offset,
        NORM=norm is not None,
        INTERLEAVED=rotation.interleaved,
        INVERSE=rotation.inverse,
        num_warps=warps,
        **blocks,
    )


def _launch_norm_backward(
    grads: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    rotation: _Rotation,
    norm: _Norm,
    weight_gradient: bool,
) -> Tensor:
    """Writes the gradients of q and k to ``outputs``; those of the weights [2, D], zero where not asked for."""
    (grad_q, grad_k), (q, k) = (tuple(_dense(x) for x in pair) for pair in (grads, inputs))
    cos, sin = _dense(rotation.cos), _dense(rotation.sin)
    blocks, warps = _blocks(q, k, cos, NORM_BACKWARD)
    programs = min(q.shape[0], PROGRAMS * gpu(q.device).processors) if weight_gradient else q.shape[0]
    # Each program's own sums, added up in a fixed order: the same bits every time.
    sums = torch.empty(programs if weight_gradient else 0, 2, q.shape[2], dtype=torch.float32, device=q.device)
    norm_rope_bwd_kernel[(programs,)](
        grad_q,
        grad_k,
        q,
        k,
        outputs[0],
        outputs[1],
        cos,
        sin,
        norm.q_weight.contiguous(),
        norm.k_weight.contiguous(),
        sums,
        q.shape[0],
        *grad_q.stride()[:2],
        *grad_k.stride()[:2],
        *q.stride()[:2],
        *k.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        norm.eps,
        norm.offset,
        WEIGHT_GRADIENT=weight_gradient,
        INTERLEAVED=rotation.interleaved,
        num_warps=warps,
        **blocks,
    )
    return sums.sum(0)


def _dense(x: Tensor) -> Tensor:
    """With a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _blocks(q: Tensor, k: Tensor, cos: Tensor, tiles: _Tiles) -> tuple[dict[str, int], int]:
    """The kernels' sizes, and warps."""
    (tokens, heads, width), rotated = q.shape, cos.shape[1]
    assert q.dtype == k.dtype and q.dtype in {torch.float16, torch.bfloat16, torch.float32}, f"{q.dtype}, {k.dtype}"
    assert k.shape[0] == tokens and k.shape[2] == width, f"q {tuple(q.shape)}, k {tuple(k.shape)}"
    assert rotated % 2 == 0 and 0 < rotated <= width and len(cos) == tokens, f"cos {tuple(cos.shape)}"
    pairs = power_of_2(rotated // 2)
    heads_at_once = max(1, tiles.elements // (2 * pairs))
    sizes = {
        "N": heads,
        "K": k.shape[1],
        "HALF": rotated // 2,
        "REST": width - rotated,
        "BLOCK_N": min(power_of_2(heads), heads_at_once),
        "BLOCK_K": min(power_of_2(k.shape[1]), heads_at_once),
        "BLOCK_P": pairs,
        "BLOCK_R": power_of_2(width - rotated),
    }
    warps = sizes["BLOCK_N"] * 2 * pairs // (32 * tiles.per_thread)
    return sizes, max(1, min(warps, 8))
