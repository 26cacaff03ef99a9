"""The memory-bound kernels: norms, rotary embedding, gated units.

Shape letters: T packed tokens, H hidden, I MLP, N heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels.benchmark.case import Case, Function, Sizes, drawn, imported

EPS = 1e-6


def rms_norms(sizes: Sizes) -> Iterator[Case]:
    """With and without the residual sum."""
    T, H = sizes.tokens, sizes.hidden
    each = T * H * sizes.dtype.itemsize

    def plain_add(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return _normed(total, w), total

    def ours() -> Function:
        rms_norm = imported("posttrain.kernels.rms_norm:rms_norm")
        return lambda x, w: rms_norm(x, w, EPS)

    def ours_add() -> Function:
        add_rms_norm = imported("posttrain.kernels.rms_norm:add_rms_norm")
        return lambda x, residual, w: add_rms_norm(x, residual, w, EPS)

    def liger() -> Function:
        function = imported("liger_kernel.ops:LigerRMSNormFunction")
        return lambda x, w: function.apply(x, w, EPS, 0.0, "llama", True, None)

    def liger_add() -> Function:
        function = imported("liger_kernel.ops:LigerFusedAddRMSNormFunction")
        return lambda x, residual, w: function.apply(x, residual, w, EPS, 0.0, "llama", False)

    def unsloth() -> Function:
        fast = imported("unsloth.kernels:fast_rms_layernorm")
        return lambda x, w: fast(SimpleNamespace(weight=w, variance_epsilon=EPS), x)

    def weight() -> Tensor:
        return 1 + drawn(sizes, H, scale=0.1)

    yield Case(
        "rms_norm",
        f"{T}×{H}",
        lambda: (drawn(sizes, T, H, gradient=True), weight()),
        ours,
        _normed,
        (2 * each, 3 * each),
        {"liger": liger},
        unsloth,
        tail=sizes.tail,
        wanted="≥ 85 %",
    )
    yield Case(
        "add_rms_norm",
        f"{T}×{H}",
        lambda: (drawn(sizes, T, H, gradient=True), drawn(sizes, T, H, gradient=True), weight()),
        ours_add,
        plain_add,
        (4 * each, 4 * each),
        {"liger": liger_add},
        outputs=2,
        tail=sizes.tail,
    )


def _normed(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-right, left), dim=-1) * sin.unsqueeze(1)


def ropes(sizes: Sizes) -> Iterator[Case]:
    """Alone and after the norm of each head."""
    T, N, K, D = sizes.tokens, sizes.heads, sizes.kv_heads, sizes.head_dim
    each = T * (N + K) * D * sizes.dtype.itemsize
    table = T * D * sizes.dtype.itemsize  # half of cos and of sin is enough

    def inputs() -> list[Tensor]:
        angles = torch.outer(
            torch.arange(T, device=sizes.device), 1e4 ** -torch.linspace(0, 1, D // 2).to(sizes.device)
        )
        angles = torch.cat((angles, angles), dim=-1)
        q, k = (drawn(sizes, T, heads, D, gradient=True) for heads in (N, K))
        return [q, k, angles.cos().to(sizes.dtype), angles.sin().to(sizes.dtype)]

    def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    def batched(function: Function) -> Function:
        """[T, N, D] as [1, N, T, D]."""

        def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
            heads_first = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k))
            return [y.squeeze(0).transpose(0, 1) for y in function(*heads_first, cos.unsqueeze(0), sin.unsqueeze(0))]

        return call

    def plain_norm(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return _rotated(_normed(q, u), cos, sin), _rotated(_normed(k, w), cos, sin)

    def ours_norm() -> Function:
        norm_rope = imported("posttrain.kernels.rope:norm_rope")
        return lambda q, k, cos, sin, u, w: norm_rope(q, k, u, w, EPS, cos, sin)

    def unsloth_norm() -> Function:
        fast = imported("unsloth.kernels.qk_norm_rope:fast_qk_norm_rope")

        def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, u: Tensor, w: Tensor) -> list[Tensor]:
            norms = (SimpleNamespace(weight=weight, variance_epsilon=EPS) for weight in (u, w))
            return [y.squeeze(0).transpose(0, 1) for y in fast(*norms, q.unsqueeze(0), k.unsqueeze(0), cos, sin)]

        return call

    shape = f"{T}×({N}+{K})×{D}"
    yield Case(
        "rope",
        shape,
        inputs,
        lambda: imported("posttrain.kernels.rope:rope"),
        plain,
        (2 * each + table, 2 * each + table),
        {"liger": lambda: batched(imported("liger_kernel.ops:LigerRopeFunction").apply)},
        lambda: batched(imported("unsloth.kernels:fast_rope_embedding")),
        outputs=2,
        tail=sizes.tail,
        wanted="≥ 85 %",
    )
    yield Case(
        "norm_rope",
        shape,
        lambda: [*inputs(), 1 + drawn(sizes, D, scale=0.1), 1 + drawn(sizes, D, scale=0.1)],
        ours_norm,
        plain_norm,
        (2 * each + table, 3 * each + table),
        unsloth=unsloth_norm,
        outputs=2,
        tail=sizes.tail,
    )


def glus(sizes: Sizes) -> Iterator[Case]:
    """SwiGLU and GeGLU."""
    yield _glu(sizes, "silu", F.silu, "LigerSiLUMulFunction", _unsloth_swiglu)
    yield _glu(sizes, "gelu_tanh", partial(F.gelu, approximate="tanh"), "LigerGELUMulFunction", None)


def _glu(sizes: Sizes, activation: str, function: Function, liger: str, unsloth: Callable[[], Function] | None) -> Case:
    T, inner = sizes.tokens, sizes.inner
    each = T * inner * sizes.dtype.itemsize

    def ours() -> Function:
        glu = imported("posttrain.kernels.glu:glu")
        return lambda gate, up: glu(gate, up, activation)

    return Case(
        "glu",
        f"{activation} {T}×{inner}",
        lambda: [drawn(sizes, T, inner, gradient=True) for _ in range(2)],
        ours,
        lambda gate, up: function(gate) * up,
        (3 * each, 5 * each),
        {"liger": lambda: imported(f"liger_kernel.ops:{liger}").apply},
        unsloth,
        tail=sizes.tail,
        wanted="≥ 85 %" if activation == "silu" else "",
    )


def _unsloth_swiglu() -> Function:
    swiglu = imported("unsloth.kernels:swiglu_fg_kernel")
    backward = imported("unsloth.kernels:swiglu_DWf_DW_dfg_kernel")

    class Swiglu(torch.autograd.Function):
        """As its fused MLP calls the two."""

        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            return swiglu(gate.unsqueeze(0), up.unsqueeze(0)).squeeze(0)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            _, of_up, of_gate = backward(gradient, *ctx.saved_tensors)
            return of_gate, of_up

    return Swiglu.apply
