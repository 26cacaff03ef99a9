"""Modules with the attributes of vLLM's, made by hand: what its fused and quantized layers look like after loading."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class _MethodBase(ABC):
    """vLLM's is abstract, which decides what class an object of it may change to."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor: ...


class Method(_MethodBase):
    """A quantization method: the plain product."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class Linear(nn.Module):
    """vLLM's linear layer: ``sizes`` are the rows of its parts."""

    def __init__(
        self, sizes: list[int], inputs: int, *, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.output_partition_sizes = sizes
        self.input_size_per_partition = inputs
        self.weight = nn.Parameter(torch.randn(sum(sizes), inputs).to(dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(sum(sizes)), requires_grad=False) if bias else None
        self.quant_method = Method()

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)


def fp8_linear(sizes: list[int], inputs: int, kernel: str = "CutlassFP8ScaledMMLinearKernel") -> Linear:
    """A layer whose weight is float8_e4m3fn; the caller sets scales and orientation."""
    layer = Linear(sizes, inputs)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    layer.quant_method.fp8_linear = type(kernel, (), {})()
    return layer


class Embedding(nn.Module):
    """vLLM's embedding or head: rows past ``org_vocab_size`` are padding."""

    def __init__(self, rows: int, vocabulary: int, width: int) -> None:
        super().__init__()
        self.org_vocab_size = vocabulary
        self.weight = nn.Parameter(torch.randn(rows, width), requires_grad=False)


def network(**layers: nn.Module) -> nn.Module:
    """``model.layers.0.mlp.gate_up_proj`` and so on from ``model__layers__0__mlp__gate_up_proj``."""
    root = nn.Module()
    for path, layer in layers.items():
        *parents, last = path.split("__")
        module = root
        for name in parents:
            if not hasattr(module, name):
                module.add_module(name, nn.Module())
            module = getattr(module, name)
        module.add_module(last, layer)
    root.packed_modules_mapping = PACKED  # type: ignore[assignment]
    return root


def wrapped(layer: Linear) -> nn.Module:
    """vLLM's own LoRA wrapper around a layer."""
    wrapper = nn.Module()
    wrapper.base_layer = layer
    return wrapper
