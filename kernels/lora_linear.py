"""Frozen linear layers with a LoRA adapter, each block of a model one autograd node that saves only what it must.

Shape letters: T packed tokens, I inputs, O outputs, R rank.

``y = x Wᵀ + s (x Aᵀ) Bᵀ``. Gradients go to A and B (float32 products, in their own type) and to x; W, dense or
quantized, has none and nothing is saved for it. With ``g = ∂/∂y``: ``∂/∂B = s gᵀ (x Aᵀ)``, ``∂/∂A = (s g B)ᵀ x`` and
``∂/∂x = g W + (s g B) A``. The low-rank term is written first and the large product accumulates on it: a sum that
costs no pass of its own. Layers on the same x share one product with their A's, stacked, in both directions.

The matrix products are cuBLAS's; at thousands of tokens they are what takes the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from posttrain.kernels.glu import glu_backward_, glu_forward
from posttrain.kernels.launch import rows
from posttrain.kernels.reference.glu import Activation
from posttrain.kernels.reference.lora import Adapted, Frozen
from posttrain.kernels.reference.precision import accumulation_dtype

_Held = tuple[tuple[Frozen, float], ...]
"""Of each layer what autograd does not see: the frozen layer and the scaling."""


def lora_linear(x: Tensor, frozen: Frozen, a: Tensor | None, b: Tensor | None, scaling: float) -> Tensor:
    """``x Wᵀ + bias + scaling (x Aᵀ) Bᵀ``: […, I] → […, O]; saves x and x Aᵀ.

    ``a`` [R, I] and ``b`` [O, R], any type, are rounded to x's, B with the scaling folded in; ``None``: no adapter.
    """
    return lora_qkv(x, [Adapted(frozen, a, b, scaling)])[0]


def lora_qkv(x: Tensor, layers: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """``lora_linear`` of several layers on the same x, which is saved once."""
    flat = x.reshape(-1, x.shape[-1])
    held, parameters = _split(layers)
    return tuple(y.view(*x.shape[:-1], -1) for y in _LoraLinears.apply(flat, held, *parameters))


def lora_mlp(
    x: Tensor, inner: Sequence[Adapted], down: Adapted, activation: Activation, *, output_used: bool = True
) -> Tensor:
    """``down(activation(gate(x)) · up(x))``: […, I] → […, O]; ``inner`` is gate and up, or one layer whose outputs are
    both in turn.

    Saves x, gate and up; the backward pass overwrites gate and up with their gradients, so there can be only one.
    Without ``output_used`` the result is 0 and only its gradients are right: what a recomputation needs costs a third
    less.
    """
    flat = x.reshape(-1, x.shape[-1])
    held, parameters = _split([*inner, down])
    y = _LoraMlp.apply(flat, held, activation, output_used, *parameters)
    return y.view(*x.shape[:-1], -1)


class _LoraLinears(torch.autograd.Function):
    """Layers on the same x [T, I]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: _Held, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        outputs, xa = _outputs(x, _joined(held, parameters))
        ctx.held = held
        ctx.save_for_backward(x, xa, *parameters)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, *parameters = ctx.saved_tensors
        layers = _joined(ctx.held, parameters)
        grad_x, of_parameters = _gradients(x, xa, [rows(g) for g in gradients], layers, ctx.needs_input_grad[0])
        return grad_x, None, *of_parameters


class _LoraMlp(torch.autograd.Function):
    """gate and up (or both in one), the gated unit, and down."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, held: _Held, activation: Activation, output_used: bool, *parameters: Tensor | None
    ) -> Tensor:
        *inner, down = _joined(held, parameters)
        outputs, xa = _outputs(x, inner)
        if output_used:
            gate, up = _gate_and_up(outputs)
            (y,), ha = _outputs(glu_forward(gate, up, activation), [down])
        else:
            y, ha = x.new_zeros(x.shape[0], down.frozen.out_features), None
        ctx.held, ctx.activation = held, activation
        ctx.save_for_backward(x, xa, ha, *outputs, *parameters)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, ha, *others = ctx.saved_tensors
        inputs = len(ctx.held) - 1
        outputs, parameters = others[:inputs], others[inputs:]
        *inner, down = _joined(ctx.held, parameters)
        gradient = rows(gradient)
        through = _through_b([gradient], [down])
        grad_h = _input_gradient([gradient], through, [down])
        gate, up = _gate_and_up(outputs)
        h, *_ = glu_backward_(grad_h, gate, up, ctx.activation)
        increment_version(outputs)  # they hold their gradients from here on: a second backward pass fails, loudly
        ha = _through_a(h, [down]) if ha is None else ha
        of_down = _parameter_gradients(h, ha, [gradient], through, [down])
        del grad_h, h
        grad_x, of_inner = _gradients(x, xa, outputs, inner, ctx.needs_input_grad[0])
        return grad_x, None, None, None, *of_inner, *of_down


def _gate_and_up(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Two views [T, I] where one layer gives both."""
    return outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=1)


def _split(layers: Sequence[Adapted]) -> tuple[_Held, list[Tensor | None]]:
    """What autograd does not see, and what it does: A and B of each layer in turn."""
    held = tuple((layer.frozen, layer.scaling) for layer in layers)
    return held, [tensor for layer in layers for tensor in (layer.a, layer.b)]


def _joined(held: _Held, parameters: Sequence[Tensor | None]) -> list[Adapted]:
    """The inverse of ``_split``."""
    pairs = zip(parameters[::2], parameters[1::2])
    return [Adapted(frozen, a, b, scaling) for (frozen, scaling), (a, b) in zip(held, pairs)]


def _outputs(x: Tensor, layers: Sequence[Adapted]) -> tuple[list[Tensor], Tensor | None]:
    """y of every layer, and ``x Aᵀ`` of all together [T, ΣR]."""
    xa = _through_a(x, layers)
    outputs = []
    for layer, part in zip(layers, _parts(xa, layers)):
        outputs.append(layer.frozen.product(x) if part is None else _output(x, part, layer))
    return outputs, xa


def _output(x: Tensor, part: Tensor, layer: Adapted) -> Tensor:
    """``x Wᵀ + bias + part (s B)ᵀ`` [T, O]; the large product comes last, onto the small one, and is rounded once."""
    b, dense = _scaled_b(layer, x.dtype), layer.frozen.dense(x.dtype)
    if dense is None:
        return layer.frozen.product(x).addmm_(part, b.T)
    y = part @ b.T if dense.bias is None else torch.addmm(dense.bias, part, b.T)
    return torch.addmm(y, x, dense.weight.T, out=y)


def _gradients(
    x: Tensor, xa: Tensor | None, gradients: Sequence[Tensor], layers: Sequence[Adapted], wants_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Of x, and of A and B of each layer in turn, from ``gradients`` of the layers' outputs."""
    through = _through_b(gradients, layers)
    of_parameters = _parameter_gradients(x, xa, gradients, through, layers)
    return _input_gradient(gradients, through, layers) if wants_x else None, of_parameters


def _through_a(x: Tensor, layers: Sequence[Adapted]) -> Tensor | None:
    """``x Aᵀ`` of every layer with an adapter [T, ΣR]."""
    stacked = _stacked(layers, x.dtype)
    return None if stacked is None else x @ stacked.T


def _through_b(gradients: Sequence[Tensor], layers: Sequence[Adapted]) -> Tensor | None:
    """``s g B`` of every layer with an adapter [T, ΣR]: what reaches A from above."""
    ranks = sum(layer.a.shape[0] for layer in layers if layer.a is not None)
    if ranks == 0:
        return None
    through = gradients[0].new_empty(gradients[0].shape[0], ranks)
    for g, part, layer in zip(gradients, _parts(through, layers), layers):
        if part is not None:
            torch.mm(g, _scaled_b(layer, g.dtype), out=part)
    return through


def _parameter_gradients(
    x: Tensor, xa: Tensor | None, gradients: Sequence[Tensor], through: Tensor | None, layers: Sequence[Adapted]
) -> list[Tensor | None]:
    """Of A and B of each layer in turn."""
    stacked = None if through is None else _long_product(through, x)  # [ΣR, I]
    found: list[Tensor | None] = []
    columns = _parts(None if stacked is None else stacked.T, layers)
    for g, part, column, layer in zip(gradients, _parts(xa, layers), columns, layers):
        if part is None or column is None:
            found += [None, None]
            continue
        assert layer.a is not None and layer.b is not None
        of_b = _long_product(g, part).mul_(layer.scaling)
        found += [column.T.to(layer.a.dtype), of_b.to(layer.b.dtype)]
    return found


def _input_gradient(gradients: Sequence[Tensor], through: Tensor | None, layers: Sequence[Adapted]) -> Tensor:
    """``Σ g W + (s g B) A`` [T, I]."""
    stacked = _stacked(layers, gradients[0].dtype)
    total = None if stacked is None or through is None else through @ stacked
    for g, layer in zip(gradients, layers):
        if total is None:
            total = layer.frozen.input_gradient(g)
        else:
            _add_input_gradient(total, g, layer.frozen)
    assert total is not None
    return total


def _add_input_gradient(total: Tensor, g: Tensor, frozen: Frozen) -> None:
    dense = frozen.dense(g.dtype)
    if dense is None:
        total += frozen.input_gradient(g)
    else:
        torch.addmm(total, g, dense.weight, out=total)


def _stacked(layers: Sequence[Adapted], dtype: torch.dtype) -> Tensor | None:
    """The A's, one under the other [ΣR, I]."""
    found = [layer.a for layer in layers if layer.a is not None]
    return torch.cat(found).to(dtype) if found else None


def _scaled_b(layer: Adapted, dtype: torch.dtype) -> Tensor:
    """``s B`` [O, R], rounded once, as the sampler has it."""
    assert layer.b is not None
    return (layer.scaling * layer.b).to(dtype)


def _parts(stacked: Tensor | None, layers: Sequence[Adapted]) -> list[Tensor | None]:
    """The columns of [T, ΣR] that belong to each layer; ``None`` for a layer without an adapter."""
    parts: list[Tensor | None] = []
    start = 0
    for layer in layers:
        if layer.a is None or stacked is None:
            parts.append(None)
            continue
        parts.append(stacked[:, start : start + layer.a.shape[0]])
        start += layer.a.shape[0]
    return parts


def _long_product(left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ right``, a sum over all tokens: kept in float32 and not rounded after (float64 for float64)."""
    wide = accumulation_dtype(left.dtype)
    if left.is_cuda and left.dtype != wide:
        return torch.mm(left.T, right, out_dtype=wide)
    return left.T.to(wide) @ right.to(wide)
