"""One LoRA adapter inside vLLM, overwritten in place: CUDA graphs and compiled code keep the addresses they saw.

Two ways to hold it. *dense*: two matrices beside each adapted layer, ``y = base(x) + (x Aᵀ) Bᵀ``; the parts of a fused
layer lie side by side, A by rows and B in blocks. *slots*: vLLM's own multi-adapter tensors.
Shape letters: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import checksum

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.rollout.vllm_layout import Layout, Place

Targets = Mapping[str, Sequence[int]]
"""Outputs and inputs of each adapted module, by its transformers name."""


def _with_lora(base: type) -> type:
    """A quantization method's class, adding the adapter's product to its own.

    A subclass and not a wrapper: vLLM asks quantization methods for their type and attributes.
    """

    class WithLora(base):
        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """``base(x) + (x Aᵀ) Bᵀ``, one rounding of the sum."""
            y = super().apply(layer, x, bias)
            hidden = x.reshape(-1, x.shape[-1]) @ layer.posttrain_lora_a.t()
            return torch.addmm(y.view(-1, y.shape[-1]), hidden, layer.posttrain_lora_b.t()).view(y.shape)

    WithLora.__name__ = base.__name__
    return WithLora


def attach(layout: Layout, targets: Targets, rank: int, like: Tensor) -> dict[str, Tensor]:
    """Give every target its zero matrices, in ``like``'s type and device; their views by PEFT's names."""
    groups: dict[str, list[tuple[str, Place]]] = {}
    for name in targets:
        place = layout.find(name)
        if place is None or not hasattr(place.module, "quant_method"):
            raise EngineError(f"vLLM has no linear layer for the adapter's {name}: leave it out of target_modules")
        groups.setdefault(place.name, []).append((name, place))
    views: dict[str, Tensor] = {}
    for parts in groups.values():
        views |= _attach_one(parts, targets, rank, like)
    return views


def _attach_one(parts: list[tuple[str, Place]], targets: Targets, rank: int, like: Tensor) -> dict[str, Tensor]:
    module: Any = parts[0][1].module
    outputs, inputs = sum(module.output_partition_sizes), targets[parts[0][0]][1]
    a_RI = like.new_zeros(rank * len(parts), inputs)
    b_OR = like.new_zeros(outputs, rank * len(parts))
    views = {}
    for index, (name, place) in enumerate(parts):
        start, stop = (0, outputs) if place.shard is None else (place.start, place.stop)
        if tuple(targets[name]) != (stop - start, inputs):
            raise EngineError(f"vLLM's {place.origin} is not the {name} of transformers: {start}:{stop}, {inputs}")
        columns = slice(rank * index, rank * (index + 1))
        views[peft_name(name, "A")] = a_RI[columns]
        views[peft_name(name, "B")] = b_OR[start:stop, columns]
    module.register_buffer("posttrain_lora_a", a_RI, persistent=False)
    module.register_buffer("posttrain_lora_b", b_OR, persistent=False)
    module.quant_method.__class__ = _with_lora(type(module.quant_method))
    return views


def slot_views(layout: Layout, manager: Any, lora_id: int, targets: Targets, rank: int) -> dict[str, Tensor]:
    """The views of an adapter in vLLM's own slots by PEFT's names; a module that has no slot is an error."""
    slot = manager.lora_index_to_id.index(lora_id)
    views = {}
    for name in targets:
        place = layout.find(name)
        module = manager.modules.get(place.name) if place else None
        stacked_a = getattr(module, "lora_a_stacked", ())
        index = (place.shard or 0) if place else 0
        if place is None or index >= len(stacked_a) or (place.shard is None and len(stacked_a) != 1):
            raise EngineError(
                f"vLLM has no adapter slot for {name}: leave it out of target_modules or use lora_backend = 'dense'"
            )
        views[peft_name(name, "A")] = stacked_a[index][slot, 0, :rank]
        views[peft_name(name, "B")] = module.lora_b_stacked[index][slot, 0, :, :rank]  # type: ignore[union-attr]
    return views


@torch.inference_mode()
def overwrite(views: Mapping[str, Tensor], flat: Tensor, layout: Sequence[tuple[str, int, tuple[int, ...]]]) -> str:
    """Copy an adapter into the engine; the checksum of what the engine holds then, read back in the same layout.

    Nothing is written unless every tensor of the engine is given, in its shape and type.
    """
    _check(views, flat, layout)
    flat = flat.to(next(iter(views.values())).device)
    held = [views[name] for name, _, _ in layout]
    torch._foreach_copy_(
        held, [flat[start : start + view.numel()].view(view.shape) for view, (_, start, _) in zip(held, layout)]
    )
    back = torch.zeros_like(flat)  # what lies between two tensors is zero on the other side, too
    torch._foreach_copy_(
        [back[start : start + view.numel()].view(view.shape) for view, (_, start, _) in zip(held, layout)], held
    )
    return checksum(back)


def _check(views: Mapping[str, Tensor], flat: Tensor, layout: Sequence[tuple[str, int, tuple[int, ...]]]) -> None:
    given = {name: tuple(shape) for name, _, shape in layout}
    missing, unknown = sorted(views.keys() - given.keys()), sorted(given.keys() - views.keys())
    if missing or unknown:
        what = f"missing {some(missing)}" if missing else f"unknown to the engine {some(unknown)}"
        raise EngineError(f"the adapter does not fit the engine: {what}")
    for name, shape in given.items():
        if shape != tuple(views[name].shape):
            raise EngineError(f"the adapter's {name} is {shape}, the engine holds {tuple(views[name].shape)}")
    dtype = next(iter(views.values())).dtype
    if flat.dtype != dtype:
        raise EngineError(f"the adapter is {flat.dtype}, the engine computes in {dtype}")
    end = 0
    for name, start, _ in layout:
        assert start == end, f"{name} does not follow the tensor before it"
        end += views[name].numel()
    assert end == flat.numel(), "the adapter's buffer holds more than its tensors"


def write_zero_adapter(folder: Path, targets: Targets, rank: int, dtype: torch.dtype) -> None:
    """A PEFT folder that changes nothing, for vLLM's own loader; its scaling is 1, the real one is in B."""
    from safetensors.torch import save_file

    tensors = {}
    for name, (outputs, inputs) in targets.items():
        tensors[peft_name(name, "A")] = torch.zeros(rank, inputs, dtype=dtype)
        tensors[peft_name(name, "B")] = torch.zeros(outputs, rank, dtype=dtype)
    endings = sorted({name.rpartition(".")[2] for name in targets})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": endings, "bias": "none"}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def peft_name(module: str, side: str) -> str:
    """PEFT's name of a module's A or B."""
    return f"base_model.model.{module}.lora_{side}.weight"


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
