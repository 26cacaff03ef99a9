"""Gated linear units: the definition, in torch.

Shape letters: T packed tokens, I MLP.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels.reference.precision import accumulation_dtype

Activation = Literal["silu", "gelu_tanh"]
"""transformers' names for them: "silu" or "swish", and "gelu_pytorch_tanh"."""


def glu(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``activation(gate) · up`` [T, I] in gate's type, rounded once (Shazeer 2020, section 2)."""
    wide = gate.to(accumulation_dtype(gate.dtype))
    gated = F.silu(wide) if activation == "silu" else F.gelu(wide, approximate="tanh")
    return (gated * up.to(wide.dtype)).to(gate.dtype)


def glu_forward(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``glu`` for callers that do their own backward."""
    with torch.no_grad():
        return glu(gate, up, activation)


def glu_backward_(grad_h: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """``(h, grad_gate, grad_up)``, each in the storage of the argument in its place, which it overwrites."""
    with torch.enable_grad():
        inputs = [x.detach().clone().requires_grad_() for x in (gate, up)]
        h = glu(inputs[0], inputs[1], activation)
        grad_gate, grad_up = torch.autograd.grad(h, inputs, grad_h)
    with torch.no_grad():
        return grad_h.copy_(h), gate.copy_(grad_gate), up.copy_(grad_up)
