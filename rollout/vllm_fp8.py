"""float8_e4m3fn weights inside vLLM: where they lie, and our own product of them with activations left in 16 bits.

vLLM 0.26 to 0.32 rounds a layer's input to fp8, too, wherever the GPU multiplies fp8. Three bits of mantissa amplify
any difference between two implementations: a trainer that rounds in the same way is 0.1 to 0.2 nats a token away.
What a layer holds after loading:

* with one scale, or one a row: ``weight`` [in, out], a row-major [out, in] transposed; ``weight_scale``. CUTLASS pads
  both sides to multiples of 16 at the end.
* in blocks of 128: ``weight`` [out, in] and ``weight_scale_inv`` [⌈out/128⌉, ⌈in/128⌉].
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.kernels import reference
from posttrain.kernels.reference import FP8_BLOCK
from posttrain.rl.errors import EngineError
from posttrain.rollout.vllm_layout import Repacked, expect
from posttrain.rollout.vllm_products import locks_beside, warm_up

if TYPE_CHECKING:
    from torch import nn

_KERNELS = frozenset(
    {
        "FlashInferFP8ScaledMMLinearKernel",
        "CutlassFP8ScaledMMLinearKernel",
        "PerTensorTorchFP8ScaledMMLinearKernel",
        "RowWiseTorchFP8ScaledMMLinearKernel",
        "ChannelWiseTorchFP8ScaledMMLinearKernel",
        "FlashInferFp8DeepGEMMDynamicBlockScaledKernel",
        "DeepGemmFp8BlockScaledMMKernel",
        "CutlassFp8BlockScaledMMKernel",
        "TritonFp8BlockScaledMMKernel",
    }
)
"""Kernels that read the weight as described above; the others (Marlin, Humming, …) shuffle it for themselves."""


def stored(module: Any) -> tuple[Tensor, Tensor]:
    """Views of a layer's weight, float8_e4m3fn [out, in], and of its scale, float32 [1], [out, 1] or one a block.

    Raises ``Repacked`` where it lies in another way.
    """
    kernel = type(getattr(module.quant_method, "fp8_linear", None)).__name__
    if kernel not in _KERNELS:
        raise Repacked(f"it is laid out for {kernel}")
    data, outputs, inputs = module.weight.data, sum(module.output_partition_sizes), module.input_size_per_partition
    if (blocks := getattr(module, "weight_scale_inv", None)) is not None:
        expect(data, (outputs, inputs), True)
        sides = (-(-outputs // FP8_BLOCK), -(-inputs // FP8_BLOCK))
        expect(blocks.data, sides, blocks.dtype == torch.float32, contiguous=False)
        return data, blocks.data
    padded = tuple(-(-size // 16) * 16 for size in (inputs, outputs))
    if tuple(data.shape) not in {(inputs, outputs), padded} or data.stride(0) != 1:
        raise Repacked(f"it is {tuple(data.shape)} with strides {data.stride()} there")
    scale = module.weight_scale.data
    if scale.numel() == 1:
        scale = scale.reshape(1)
    elif scale.numel() in (outputs, data.shape[1]):
        scale = scale.reshape(-1, 1)[:outputs]
    else:
        raise Repacked(f"its scale is {tuple(scale.shape)} there")
    expect(scale, tuple(scale.shape), scale.dtype == torch.float32)
    return data.t()[:outputs, :inputs], scale


@functools.cache
def _weight_only(base: type) -> type:
    """A quantization method's class with our product: the input stays as it is.

    A subclass of that one class alone: Python lets an object change to no other kind.
    """

    class WeightOnly(base):
        posttrain_weight_only = True

        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """[…, in] → […, out]."""
            weight, scale, locks = layer.posttrain_fp8_weight, layer.posttrain_fp8_scale, layer.posttrain_fp8_locks
            y = torch.ops.posttrain.fp8_linear(x.reshape(-1, x.shape[-1]), weight, scale, bias, locks)
            return y.view(*x.shape[:-1], y.shape[-1])

    WeightOnly.__name__ = base.__name__
    return WeightOnly


def use_weight_only(model: nn.Module, like: Tensor) -> None:
    """Give every fp8 layer of ``model`` our product, and compile it for inputs of ``like``'s type and device.

    Kernels such as Marlin, which leave the input alone themselves, keep no fp8 tensor and are passed over.
    """
    warm: set[tuple[Any, ...]] = set()
    for name, module in model.named_modules():
        weight, method = getattr(module, "weight", None), getattr(module, "quant_method", None)
        if method is None or not isinstance(weight, Tensor) or weight.dtype != torch.float8_e4m3fn:
            continue
        try:
            view, scale = stored(module)
        except Repacked as reason:
            raise EngineError(
                f"{name} cannot be computed without rounding its input to fp8, {reason}: use "
                "rollout.fp8_activations = true, or another checkpoint"
            ) from None
        module.register_buffer("posttrain_fp8_weight", view, persistent=False)
        module.register_buffer("posttrain_fp8_scale", scale, persistent=False)
        module.register_buffer("posttrain_fp8_locks", locks_beside(view), persistent=False)
        base: Any = type(method)
        method.__class__ = _weight_only(base)
        kind = tuple(view.shape), tuple(scale.shape), getattr(module, "bias", None) is None
        if view.is_cuda and kind not in warm:
            from posttrain.kernels.fp8_linear import KERNEL_ROWS, TILES

            warm.add(kind)
            warm_up(module, view.shape[1], [*(tiles.rows for tiles in TILES), KERNEL_ROWS + 1], like)


@torch.library.custom_op(
    "posttrain::fp8_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor locks) -> Tensor",
)
def _fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, locks: Tensor) -> Tensor:
    """One node to vLLM's compiler. ``locks`` are as they were when it is done, so nothing is mutated."""
    if not x.is_cuda:
        return reference.fp8_linear(x, weight, scale, bias)
    from posttrain.kernels.fp8_linear import fp8_linear

    return fp8_linear(x, weight, scale, bias, locks)


@_fp8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, locks: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
