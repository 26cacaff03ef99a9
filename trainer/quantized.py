"""Frozen linear layers in 4 or 8 bits: dequantized at each use, never kept, differentiable in their input.

Shape letters: O output features, I input features, N blocks of weights under one absmax.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.kernels.reference import FP8_BLOCK, Dense, dequantize_fp8
from posttrain.rl.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NF4_BLOCK = 64
"""Weights under one absmax: bitsandbytes' and vLLM's default."""
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_OUTPUT_TYPES = (torch.bfloat16, torch.float16, torch.float32)


class QuantizedLinear(nn.Linear, ABC):
    """``y = x Wᵀ + b`` with a frozen W that is dequantized in the forward and again in the backward pass.

    ``weight`` is uint8 in every scheme: its bits. So nothing that looks at a layer's type, as peft does to choose the
    adapter's, takes the storage type for the type of the computation; that one is ``compute_dtype``.
    Dequantizing and a dense product, not a product of the packed weight: with the thousands of rows of a training step
    the tensor cores are what takes the time.
    """

    kernels: Literal["triton", "reference"] = "reference"
    """What dequantizes: one pass of ours, or bitsandbytes and torch. The bits are the same."""

    def __init__(self, weight: Tensor, shape: tuple[int, ...], compute_dtype: torch.dtype) -> None:
        """Hold ``weight`` itself, not a copy."""
        super().__init__(shape[1], shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.compute_dtype = compute_dtype

    @abstractmethod
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """A fresh [O, I]."""

    def dense(self, dtype: torch.dtype) -> Dense | None:
        """Weight and bias as the kernels multiply by them."""
        return Dense(self.dequantized(dtype), self.bias)

    def product(self, x: Tensor) -> Tensor:
        """[…, I] → […, O], the bias added."""
        return F.linear(x, self.dequantized(x.dtype), self.bias)

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """``gradient W``: […, O] → […, I]."""
        return gradient @ self.dequantized(gradient.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[…, I] → […, O]."""
        return _FrozenProduct.apply(input, self)


class Nf4Linear(QuantizedLinear):
    """bitsandbytes' NF4 (2305.14314): 4-bit codes, two a byte, and an absmax for each block of weights."""

    absmax: Tensor
    code: Tensor

    def __init__(self, tensors: dict[str, Tensor], shape: tuple[int, ...], block_size: int, dtype: torch.dtype) -> None:
        """``tensors``: ``weight`` uint8 [⌈OI/2⌉, 1], ``absmax`` float32 [N], ``code`` float32 [16]."""
        _require_bitsandbytes()
        super().__init__(tensors["weight"], shape, dtype)
        self.block_size = block_size
        self.register_buffer("absmax", tensors["absmax"], persistent=False)
        self.register_buffer("code", tensors["code"], persistent=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """See ``QuantizedLinear``."""
        output = dtype if dtype in _OUTPUT_TYPES else torch.float32
        shape = (self.out_features, self.in_features)
        if self.kernels == "triton":
            from posttrain.kernels.nf4 import dequantize_nf4

            return dequantize_nf4(self.weight.data, self.absmax, shape, output, block_size=self.block_size).to(dtype)
        weight = torch.ops.bitsandbytes.dequantize_4bit(
            self.weight.data, self.absmax, self.block_size, "nf4", shape, output
        )
        return weight.to(dtype)


class Fp8Linear(QuantizedLinear):
    """float8_e4m3fn times a scale: one, one an output feature, or one for each square of 128 × 128 weights.

    Where the engine rounds the inputs to float8_e4m3fn, too, so does this layer: it is the sampler's policy that is to
    be trained. The gradient passes the rounding as if it were not there (straight-through, 1308.3432).
    """

    scale: Tensor

    def __init__(
        self,
        tensors: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        activations: Literal["token", "group"] | None = None,
    ) -> None:
        """``tensors``: ``weight`` float8_e4m3fn [O, I], any strides; ``scale`` and ``activations`` as in
        ``SharedWeight``.
        """
        super().__init__(tensors["weight"].view(torch.uint8), shape, dtype)
        self.activations = activations
        self.register_buffer("scale", tensors["scale"], persistent=False)

    def dense(self, dtype: torch.dtype) -> Dense | None:
        """See ``QuantizedLinear``; None where the inputs are rounded, too."""
        return None if self.activations else super().dense(dtype)

    def product(self, x: Tensor) -> Tensor:
        """See ``QuantizedLinear``; on tensor cores for fp8 where one scale a token and an output feature suffice."""
        if self.activations is None:
            return super().product(x)
        bits, scale = round_to_fp8(x, x.shape[-1] if self.activations == "token" else FP8_BLOCK)
        if not self._on_tensor_cores(x):
            return super().product((bits.float() * scale).flatten(-2).to(x.dtype))
        rows = bits.view(-1, self.in_features)
        weight = self.weight.data.view(torch.float8_e4m3fn)
        scales = self.scale.view(1, -1).expand(1, self.out_features).contiguous()
        y = torch._scaled_mm(rows, weight.t(), scale.view(-1, 1), scales, self.bias, out_dtype=x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _on_tensor_cores(self, x: Tensor) -> bool:
        return (
            x.is_cuda
            and x.dtype == torch.bfloat16
            and torch.cuda.get_device_capability(x.device) >= (9, 0)
            and self.activations == "token"
            and (self.scale.numel() == 1 or self.scale.shape == (self.out_features, 1))
            and self.in_features % 16 == 0
            and self.out_features % 16 == 0
            and self.weight.stride() == (self.in_features, 1)
        )

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """See ``QuantizedLinear``."""
        weight = self.weight.data.view(torch.float8_e4m3fn)
        if self.kernels == "triton":
            from posttrain.kernels import fp8

            return fp8.dequantize_fp8(weight, self.scale, dtype if dtype in _OUTPUT_TYPES else torch.float32).to(dtype)
        return dequantize_fp8(weight, self.scale, dtype)


def round_to_fp8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """[…, I] → float8_e4m3fn […, I/group, group] and float32 scales […, I/group, 1]; ``group`` divides I.

    As vLLM does it: the largest input of a group becomes 448, and no scale is below 1/(448·512).
    """
    groups = x.float().unflatten(-1, (-1, group))
    scale = (groups.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_min(1 / (FP8_MAX * 512))
    return (groups / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


class _FrozenProduct(torch.autograd.Function):
    """Linear layer that saves nothing: the layer itself is at hand in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return ctx.layer.input_gradient(gradient), None


def quantized(weight: Tensor, scheme: Literal["nf4", "fp8"]) -> QuantizedLinear:
    """A layer around a dense [O, I], quantized where it lies; its type becomes that of the computation."""
    shape = tuple(weight.shape)
    if scheme == "fp8":
        scale = (weight.abs().amax().float() / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny).reshape(1)
        bits = (weight.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return Fp8Linear({"weight": bits, "scale": scale}, shape, weight.dtype)
    _require_bitsandbytes()
    from bitsandbytes.functional import quantize_4bit

    source = weight if weight.dtype in _OUTPUT_TYPES else weight.float()
    bits, state = quantize_4bit(source.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    tensors = {"weight": bits, "absmax": state.absmax, "code": nf4_code(weight.device)}
    return Nf4Linear(tensors, shape, NF4_BLOCK, weight.dtype)


def nf4_code(device: torch.device) -> Tensor:
    """The 16 values of NF4, float32 [16]."""
    _require_bitsandbytes()
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device=device)


@torch.no_grad()
def quantize_linears(model: PreTrainedModel, scheme: Literal["nf4", "fp8"], device: torch.device) -> None:
    """Quantize every linear layer but the head onto ``device``, one at a time; the rest of the model follows as it is.

    The model may lie on the host: the device then never holds more than one dense layer of it.
    """
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            layer = quantized(module.weight.to(device), scheme)
            if module.bias is not None:
                layer.bias = nn.Parameter(module.bias.to(device), requires_grad=False)
            model.set_submodule(name, layer)
    model.to(device)


def use_kernels(model: nn.Module, kernels: Literal["triton", "reference"]) -> None:
    """Have every quantized layer of ``model`` dequantize that way from now on."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.kernels = kernels


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401 — it registers torch.ops.bitsandbytes
    except ImportError as error:
        raise EngineError(
            'model.quantization = "nf4" needs bitsandbytes: pip install "posttrain[bnb]", or use "fp8" or "none"'
        ) from error
