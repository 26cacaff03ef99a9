"""Where the modules of a transformers model lie in vLLM's model: renamed, and several fused into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_WRAPPED = ".base_layer"


class Repacked(Exception):
    """The engine holds a weight in a form of its own; the message says which."""


def expect(data: Tensor, shape: tuple[int, ...], right_type: bool, *, contiguous: bool = True) -> None:
    """Raise ``Repacked`` unless a tensor lies as it should."""
    if tuple(data.shape) != shape or not right_type or (contiguous and not data.is_contiguous()):
        raise Repacked(f"it is {data.dtype} {tuple(data.shape)} with strides {data.stride()} there")


@dataclass(slots=True, frozen=True)
class Place:
    """One transformers module inside the engine."""

    name: str
    """The engine's module."""
    module: Any
    shard: int | None = None
    """Which part of a fused layer it is; ``None``: the whole module."""
    start: int = 0
    stop: int = 0
    """Its output rows, of a part of a fused layer."""

    @property
    def origin(self) -> str:
        """For messages."""
        return self.name if self.shard is None else f"{self.name}[{self.start}:{self.stop}]"


class Layout:
    """Finds modules by their transformers name."""

    def __init__(
        self, model: nn.Module, packed: Mapping[str, Sequence[str]], rename: Callable[[str], str | None]
    ) -> None:
        """``packed``: the parts of each fused layer, by the last part of their names; ``rename``: to vLLM's names."""
        self._packed, self._rename = packed, rename
        # A LoRA wrapper of vLLM's comes before the layer it wraps, which takes its name.
        self._modules = {name.replace(_WRAPPED, ""): module for name, module in model.named_modules()}

    @classmethod
    def of(cls, model: Any) -> Layout:
        """The layout that a model of vLLM's declares."""
        packed: dict[str, Sequence[str]] = {}
        for part in (*model.children(), model):
            packed |= getattr(part, "packed_modules_mapping", None) or {}
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        # The mapper that leaves q, k, v unfused: vLLM 0.26 has the first name, 0.32 the second.
        for method in ("get_unstacked_mapper", "get_rename_mapper"):
            mapper = getattr(mapper, method, lambda mapper=mapper: mapper)()
        return cls(model, packed, mapper._map_name if mapper is not None else lambda name: name)

    def find(self, name: str) -> Place | None:
        """The place of a transformers module; ``None`` where the engine has none, or fuses it in an unknown way."""
        renamed = self._rename(name)
        if renamed is None:
            return None
        if renamed in self._modules:
            return Place(renamed, self._modules[renamed])
        parent, _, last = renamed.rpartition(".")
        for fused, parts in self._packed.items():
            whole = f"{parent}.{fused}" if parent else fused
            sizes = getattr(self._modules.get(whole), "output_partition_sizes", ())
            if last in parts and len(sizes) == len(parts):
                shard = list(parts).index(last)
                start = sum(sizes[:shard])
                return Place(whole, self._modules[whole], shard, start, start + sizes[shard])
        return None
