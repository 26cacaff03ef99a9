"""The engine's frozen weights under transformers' names, as handles to the memory they lie in. Nothing is copied.

What a quantized layer holds, in vLLM 0.26 to 0.32:

* bitsandbytes: ``weight`` uint8 [bytes, 1], the parts of a fused layer end to end (``bnb_shard_offsets``), each with a
  ``QuantState`` of its own (``bnb_quant_state``).
* fp8: see ``vllm_fp8``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from posttrain.kernels.reference import FP8_BLOCK
from posttrain.rl.fingerprint import checksums
from posttrain.rl.sharing import share
from posttrain.rl.types import SharedWeight
from posttrain.rollout.vllm_fp8 import stored
from posttrain.rollout.vllm_layout import Layout, Place, Repacked, expect

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class Held:
    """A weight as it lies in the engine: views of its storage."""

    scheme: Literal["dense", "nf4", "fp8"]
    tensors: Mapping[str, Tensor]
    block_size: int | None = None
    activations: Literal["token", "group"] | None = None


def exported(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, SharedWeight], list[Tensor]]:
    """Every transformers parameter in ``shapes``, and the tensors whose memory the handles need beside the model's."""
    found: dict[str, Held | Repacked] = {}
    origins: dict[str, str] = {}
    schemes: dict[str, Literal["dense", "nf4", "fp8"]] = {}
    for name, shape in shapes.items():
        module_name, _, leaf = name.rpartition(".")
        place = layout.find(module_name)
        origins[name] = f"{place.origin}.{leaf}" if place else name
        try:
            found[name] = held(place, leaf, tuple(shape))
        except Repacked as reason:
            found[name] = reason
            schemes[name] = _scheme(place, leaf)
    tensors = [tensor for weight in found.values() if isinstance(weight, Held) for tensor in weight.tensors.values()]
    digests = iter(checksums(tensors))
    weights = {}
    for name, weight in found.items():
        shape, origin = tuple(shapes[name]), origins[name]
        if isinstance(weight, Repacked):
            weights[name] = SharedWeight(schemes[name], {}, shape, {}, origin, repacked=str(weight))
            continue
        weights[name] = SharedWeight(
            weight.scheme,
            {part: share(tensor) for part, tensor in weight.tensors.items()},
            shape,
            {part: next(digests) for part in weight.tensors},
            origin,
            block_size=weight.block_size,
            activations=weight.activations,
        )
    return weights, tensors


def held(place: Place | None, leaf: str, shape: tuple[int, ...]) -> Held:
    """The views behind one transformers parameter; raises ``Repacked`` where there are none that others can read."""
    parameter = getattr(place.module, leaf, None) if place else None
    if place is None or parameter is None:
        raise Repacked("the engine has no tensor for it")
    if leaf == "weight" and hasattr(parameter, "bnb_quant_state"):
        return _nf4(place, parameter, shape)
    data = parameter.data
    if leaf == "weight" and data.dtype == torch.float8_e4m3fn:
        return _fp8(place, shape)
    return _dense(place, data, shape)


def _scheme(place: Place | None, leaf: str) -> Literal["dense", "nf4", "fp8"]:
    """How the engine quantizes a weight that it keeps in a form of its own: a private copy has to be rounded alike."""
    if place is None or leaf != "weight":
        return "dense"
    states = getattr(getattr(place.module, leaf, None), "bnb_quant_state", None) or {}
    if any(getattr(state, "quant_type", None) == "nf4" for state in states.values()):
        return "nf4"
    return "fp8" if hasattr(getattr(place.module, "quant_method", None), "fp8_linear") else "dense"


def _dense(place: Place, data: Tensor, shape: tuple[int, ...]) -> Held:
    if hasattr(place.module, "cpu_linear") and data.numel() == 0:
        raise Repacked("vLLM's CPU build keeps it in oneDNN's own layout")
    if (vocabulary := getattr(place.module, "org_vocab_size", None)) is not None:
        data = data[:vocabulary]
    if place.shard is not None:
        data = data[place.start : place.stop]
    expect(data, shape, torch.is_floating_point(data) and data.element_size() > 1)
    return Held("dense", {"weight": data})


def _nf4(place: Place, parameter: Any, shape: tuple[int, ...]) -> Held:
    states, offsets = parameter.bnb_quant_state, [int(offset) for offset in parameter.bnb_shard_offsets]
    if place.shard is None and len(states) != 1:
        raise Repacked(f"it is quantized in {len(states)} pieces there")
    shard = place.shard or 0
    state = states[shard]
    if getattr(state, "quant_type", None) != "nf4" or tuple(state.shape) != shape:
        raise Repacked(f"it is {getattr(state, 'quant_type', 'int8')} {tuple(getattr(state, 'shape', ()))} there")
    packed = parameter.data[offsets[shard] : offsets[shard + 1]]
    expect(packed, ((math.prod(shape) + 1) // 2, 1), packed.dtype == torch.uint8)
    absmax = _unnested(state) if state.nested else state.absmax
    expect(absmax, (math.ceil(math.prod(shape) / state.blocksize),), absmax.dtype == torch.float32)
    return Held("nf4", {"weight": packed, "absmax": absmax, "code": state.code}, state.blocksize)


def _unnested(state: Any) -> Tensor:
    """float32 absmax of a doubly quantized state: a private tensor of 1/16 of the weight's bytes."""
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def _fp8(place: Place, shape: tuple[int, ...]) -> Held:
    weight, scale = stored(place.module)
    rows = weight.shape[0]
    start, stop = (0, rows) if place.shard is None else (place.start, place.stop)
    if shape != (stop - start, weight.shape[1]):
        raise Repacked(f"it is {tuple(weight.shape)} there")
    if scale.ndim == 2 and scale.shape[0] != rows:
        if start % FP8_BLOCK or (stop % FP8_BLOCK and stop != rows):
            raise Repacked(f"its rows {start} to {stop} cut a block of {FP8_BLOCK} under one scale")
        scale = scale[start // FP8_BLOCK : -(-stop // FP8_BLOCK)]
    elif scale.ndim == 2:
        scale = scale[start:stop]
    tensors = {"weight": weight[start:stop], "scale": scale}
    return Held("fp8", tensors, activations=_activations(place.module.quant_method))


def _activations(method: Any) -> Literal["token", "group"] | None:
    """What the layer's kernel does to its input before it multiplies."""
    key = getattr(method, "activation_quant_key", None)
    if getattr(method, "posttrain_weight_only", False) or key is None or key.scale.static:
        return None
    rows, columns = key.scale.group_shape
    return {(1, -1): "token", (1, FP8_BLOCK): "group"}.get((rows, columns))  # type: ignore[return-value]
