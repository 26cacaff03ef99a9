"""bitsandbytes' NF4 weights inside vLLM, multiplied by our own kernel: the packed weight is read once.

vLLM 0.26 to 0.32 multiplies each part of a fused layer by itself, into a tensor of its own that is then copied. What a
layer holds after loading: ``weight`` uint8 [bytes, 1], the parts of a fused layer end to end, each with a
``QuantState``. The rows of a layer are whole blocks, so one matrix under one absmax is what lies there; only the parts'
absmax are apart and are put together, once, the states' becoming views of the whole.

On wherever Triton kernels run; there is no setting for it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.kernels import reference
from posttrain.rollout.vllm_products import locks_beside, warm_up

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


def use_packed_product(model: nn.Module, like: Tensor) -> None:
    """Give every nf4 layer of ``model`` our product, and compile it for inputs of ``like``'s type and device.

    Layers in 8 bits, in fp4 or with blocks that reach from one row into the next keep vLLM's product, named in the log.
    """
    warm: set[tuple[int, int, bool]] = set()
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        method = getattr(module, "quant_method", None)
        states = getattr(weight, "bnb_quant_state", None)
        if method is None or not states:
            continue
        parts = [states[index] for index in range(len(states))]
        reason = _unfit(parts)
        if reason is not None:
            log.warning("%s keeps vLLM's own product: %s", name, reason)
            continue
        module.register_buffer("posttrain_nf4_weight", weight.data, persistent=False)
        module.register_buffer("posttrain_nf4_absmax", _one_absmax(parts), persistent=False)
        module.register_buffer("posttrain_nf4_locks", locks_beside(weight.data), persistent=False)
        module.posttrain_nf4_block_size = parts[0].blocksize
        base: Any = type(method)
        method.__class__ = _packed(base)
        inputs = parts[0].shape[1]
        kind = (weight.numel(), inputs, getattr(module, "bias", None) is None)
        if weight.is_cuda and kind not in warm:
            from posttrain.kernels.nf4 import KERNEL_ROWS, TILES

            warm.add(kind)
            warm_up(module, inputs, [*(tiles.rows for tiles in TILES), KERNEL_ROWS + 1], like)


def _unfit(parts: Sequence[Any]) -> str | None:
    """Why the parts of a layer are not one nf4 matrix in whole blocks; ``None``: they are."""
    for part in parts:
        if getattr(part, "quant_type", None) != "nf4":
            return f"it is {getattr(part, 'quant_type', 'int8')}"
        if part.nested or part.absmax.dtype != torch.float32:
            return "its absmax is quantized"
        if part.blocksize != parts[0].blocksize or part.shape[1] != parts[0].shape[1] or part.shape[1] % part.blocksize:
            return f"its {part.shape[1]} inputs are not whole blocks of {part.blocksize}"
        if not torch.equal(part.code.cpu(), torch.tensor(reference.NF4_CODE)):
            return "its code book is not NF4's"
    return None


def _one_absmax(parts: Sequence[Any]) -> Tensor:
    """The absmax of all parts end to end; each part's own is a view of it from now on."""
    if len(parts) == 1:
        return parts[0].absmax
    whole = torch.cat([part.absmax.view(-1) for part in parts])
    start = 0
    for part in parts:
        stop = start + part.absmax.numel()
        part.absmax = whole[start:stop]
        start = stop
    return whole


@functools.cache
def _packed(base: type) -> type:
    """A quantization method's class with our product. A subclass of that one class alone: see ``vllm_fp8``."""

    class Packed(base):
        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """[…, in] → […, out] in x's type; vLLM's own computes in bfloat16 always."""
            y = torch.ops.posttrain.nf4_linear(
                x.reshape(-1, x.shape[-1]),
                layer.posttrain_nf4_weight,
                layer.posttrain_nf4_absmax,
                layer.posttrain_nf4_block_size,
                bias,
                layer.posttrain_nf4_locks,
            )
            return y.view(*x.shape[:-1], y.shape[-1])

    Packed.__name__ = base.__name__
    return Packed


@torch.library.custom_op(
    "posttrain::nf4_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor absmax, int block_size, Tensor? bias, Tensor locks) -> Tensor",
)
def _nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, block_size: int, bias: Tensor | None, locks: Tensor
) -> Tensor:
    """One node to vLLM's compiler. ``locks`` are as they were when it is done, so nothing is mutated."""
    shape = (_outputs(x, packed), x.shape[1])
    if not x.is_cuda:
        return reference.nf4_linear(x, packed, absmax, shape, block_size=block_size, bias=bias)
    from posttrain.kernels.nf4 import nf4_linear

    return nf4_linear(x, packed, absmax, shape, block_size=block_size, bias=bias, locks=locks)


@_nf4_linear.register_fake
def _(x: Tensor, packed: Tensor, absmax: Tensor, block_size: int, bias: Tensor | None, locks: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], _outputs(x, packed))


def _outputs(x: Tensor, packed: Tensor) -> int:
    """Rows of a packed weight, two numbers a byte."""
    return 2 * packed.numel() // x.shape[1]
