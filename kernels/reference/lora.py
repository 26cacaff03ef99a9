"""Frozen linear layers with a LoRA adapter (2106.09685): the definition, in torch.

Shape letters: T packed tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels.reference.glu import Activation, glu


class Frozen(Protocol):
    """A linear layer ``x Wᵀ + bias`` without gradients of its own, whatever form W is stored in."""

    @property
    def out_features(self) -> int:
        """O."""
        ...

    def dense(self, dtype: torch.dtype) -> Dense | None:
        """The layer with W as it is multiplied, made anew where it is stored otherwise; None where ``product`` does
        more than multiply.
        """
        ...

    def product(self, x: Tensor) -> Tensor:
        """``x Wᵀ + bias``, fresh: [T, I] → [T, O]."""
        ...

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """``gradient W``, fresh: [T, O] → [T, I]."""
        ...


class Dense(NamedTuple):
    """A frozen layer whose weight is stored as it is multiplied."""

    weight: Tensor
    """[O, I], in the type of the activations."""
    bias: Tensor | None = None
    """[O]."""

    @property
    def out_features(self) -> int:
        """See ``Frozen``."""
        return self.weight.shape[0]

    def dense(self, dtype: torch.dtype) -> Dense:
        """See ``Frozen``."""
        return self

    def product(self, x: Tensor) -> Tensor:
        """See ``Frozen``."""
        return F.linear(x, self.weight, self.bias)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """See ``Frozen``."""
        return gradient @ self.weight


class Adapted(NamedTuple):
    """A frozen layer and the adapter on it: ``x Wᵀ + bias + scaling (x Aᵀ) Bᵀ``; without one, ``a`` and ``b`` are None.

    A and B are rounded to the type of x where they are used, B with ``scaling`` folded in.
    """

    frozen: Frozen
    a: Tensor | None = None
    """[R, I]."""
    b: Tensor | None = None
    """[O, R]."""
    scaling: float = 1.0


def lora_linear(x: Tensor, frozen: Frozen, a: Tensor | None, b: Tensor | None, scaling: float) -> Tensor:
    """``x Wᵀ + bias + scaling (x Aᵀ) Bᵀ``: […, I] → […, O]."""
    y = frozen.product(x)
    if a is None or b is None:
        return y
    return y + (x @ a.to(x.dtype).T) @ (scaling * b).to(x.dtype).T


def lora_qkv(x: Tensor, layers: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """``lora_linear`` of several layers on the same x."""
    return tuple(lora_linear(x, *layer) for layer in layers)


def lora_mlp(x: Tensor, inner: Sequence[Adapted], down: Adapted, activation: Activation) -> Tensor:
    """``down(activation(gate(x)) · up(x))``; ``inner`` is gate and up, or one layer whose outputs are both in turn."""
    outputs = lora_qkv(x, inner)
    gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
    return lora_linear(glu(gate, up, activation), *down)
