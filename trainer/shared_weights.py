"""A transformers model whose frozen weights are the engine's own memory: mapped, proven, never copied."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import checksum, checksums
from posttrain.rl.sharing import opened
from posttrain.trainer.model import resolve_dtype
from posttrain.trainer.quantized import FP8_BLOCK, Fp8Linear, Nf4Linear, QuantizedLinear, nf4_code, quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from posttrain.rl.config import ModelConfig
    from posttrain.rl.types import SharedWeight, SharedWeights

log = logging.getLogger(__name__)

_PARTS = {"dense": {"weight"}, "nf4": {"weight", "absmax", "code"}, "fp8": {"weight", "scale"}}


@dataclass(frozen=True)
class HeldTensor:
    """Where a frozen tensor of the trainer lies."""

    name: str
    data_ptr: int
    bytes: int
    shared: bool
    """Whether it is the engine's memory."""


def bind(
    source: str | Path, config: ModelConfig, shared: SharedWeights, device: torch.device, *, copy_repacked: bool
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model of ``source`` around ``shared``, and the mapped tensors by name (``….weight``, ``….weight.absmax``).

    With ``copy_repacked``, a weight that only the engine can read is loaded from the checkpoint instead. Raises
    ``EngineError`` naming the first weight that is missing, unknown, repacked, of another form, or whose bytes are not
    those that the engine holds.
    """
    dtype = resolve_dtype(config.dtype, device)
    model = _without_storage(source, config, dtype)
    tied = set(model.all_tied_weights_keys)
    forms = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    _compare_names(source, forms, shared)
    mapped: dict[str, Tensor] = {}
    for name, weight in shared.items():
        if tuple(weight.shape) != tuple(forms[name].shape):
            raise _misfit(name, weight, f"has shape {list(weight.shape)}, the trainer's is {list(forms[name].shape)}")
        if weight.repacked is not None:
            if not copy_repacked:
                raise EngineError(
                    f"{name}: the engine's copy ({weight.origin}) cannot be shared: {weight.repacked}. Set "
                    "trainer.copy_repacked_weights = true to load a private copy of it"
                )
            tensor = _from_checkpoint(source, config, name, weight).to(device, dtype)
            log.warning("%s: private copy, %.1f MiB dense (%s)", name, tensor.nbytes / 2**20, weight.repacked)
            _place(model, name, tensor if weight.scheme == "dense" else quantized(tensor, weight.scheme))
            continue
        tensors = {part: opened(handle) for part, handle in weight.tensors.items()}
        _check_form(name, weight, tensors, dtype, device)
        mapped.update({name if part == "weight" else f"{name}.{part}": tensor for part, tensor in tensors.items()})
        _place(model, name, _wrapped(weight, tensors, dtype))
    model.tie_weights()
    model = model.to(device)  # the buffers; every parameter is there already
    _prove(model, mapped)
    _compare_bytes(shared, mapped)
    return model, mapped


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every weight under the adapter by its transformers name, with what its quantization needs. Buffers that are
    computed, not loaded, are left out: some rotary frequencies change with the longest sequence.
    """
    loaded = model.state_dict().keys()
    found: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        state = isinstance(model.get_submodule(path), QuantizedLinear) and leaf not in ("weight", "bias")
        if ".lora_" not in name and (state or name in loaded):
            plain = path.removesuffix(".base_layer")
            found[f"{plain}.weight.{leaf}" if state else f"{plain}.{leaf}"] = tensor
    return found


def storage_report(model: nn.Module, mapped: Mapping[str, Tensor]) -> list[HeldTensor]:
    """Each frozen tensor of the model, and whether its storage is that of the mapped one."""
    report = []
    for name, tensor in frozen_tensors(model).items():
        same = name in mapped and (
            tensor.untyped_storage().data_ptr() == mapped[name].untyped_storage().data_ptr()
            and tensor.data_ptr() == mapped[name].data_ptr()
        )
        report.append(HeldTensor(name, tensor.data_ptr(), tensor.nbytes, same))
    return report


def _without_storage(source: str | Path, config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture with parameters on the meta device and its buffers computed."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = config.trust_remote_code
    try:
        settings = AutoConfig.from_pretrained(str(source), revision=config.revision, trust_remote_code=trust)
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(settings, dtype=dtype, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot build {source} as a causal language model: {str(error).splitlines()[0]}") from error


def _compare_names(source: str | Path, forms: Mapping[str, Tensor], shared: SharedWeights) -> None:
    missing = [name for name in forms if name not in shared]
    unknown = [name for name in shared if name not in forms]
    if missing or unknown:
        parts = [f"the engine does not share {missing[0]} ({len(missing)} in all)"] if missing else []
        parts += [f"it shares {unknown[0]} ({len(unknown)} in all), which the model has not"] if unknown else []
        raise EngineError(f"{source}: the engine's weights do not fit the transformers model: {'; '.join(parts)}")


def _check_form(
    name: str, weight: SharedWeight, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Types, sizes and device are what the scheme promises."""
    if tensors.keys() != _PARTS[weight.scheme]:
        raise _misfit(name, weight, f"is {weight.scheme} but comes as {', '.join(sorted(tensors)) or 'nothing'}")
    main, (rows, *others) = tensors["weight"], weight.shape
    elsewhere = [tensor.device for tensor in tensors.values() if tensor.device != device]
    if elsewhere:
        raise _misfit(name, weight, f"lies on {elsewhere[0]}, the trainer runs on {device}")
    if weight.scheme == "dense":
        if tuple(main.shape) != tuple(weight.shape):
            raise _misfit(name, weight, f"comes as {list(main.shape)} for a shape of {list(weight.shape)}")
        if main.dtype not in (dtype, torch.float32):
            raise _misfit(name, weight, f"is {main.dtype}, the trainer computes in {dtype}: set model.dtype")
        return
    if len(others) != 1 or not name.endswith(".weight"):
        raise _misfit(name, weight, f"is {weight.scheme}, which only linear layers can be")
    columns = others[0]
    numbers = rows * columns
    if weight.scheme == "nf4":
        blocks = -(-numbers // (weight.block_size or numbers))
        expected = {
            "weight": ([-(-numbers // 2), 1], torch.uint8),
            "absmax": ([blocks], torch.float32),
            "code": ([16], torch.float32),
        }
        found = {part: (list(tensor.shape), tensor.dtype) for part, tensor in tensors.items()}
        if weight.block_size is None or found != expected:
            raise _misfit(name, weight, f"comes as {found}, nf4 in blocks of {weight.block_size} is {expected}")
        return
    scale = tensors["scale"]
    scales: tuple[list[int], ...] = ([], [1], [1, 1], [rows, 1], [-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)])
    fits = main.dtype == torch.float8_e4m3fn and list(main.shape) == [rows, columns]
    if not fits or scale.dtype != torch.float32 or list(scale.shape) not in scales:
        raise _misfit(
            name,
            weight,
            f"comes as {list(main.shape)} {main.dtype} with scales {list(scale.shape)} {scale.dtype}, which is not "
            f"fp8 for {[rows, columns]}",
        )


def _wrapped(weight: SharedWeight, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor | QuantizedLinear:
    if weight.scheme == "nf4":
        assert weight.block_size is not None
        return Nf4Linear(tensors, weight.shape, weight.block_size, dtype)
    if weight.scheme == "fp8":
        return Fp8Linear(tensors, weight.shape, dtype, weight.activations)
    return tensors["weight"]


def _place(model: nn.Module, name: str, value: Tensor | QuantizedLinear) -> None:
    """Put a tensor where the model has a parameter or buffer, or a quantized layer where it has a dense one."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(value, QuantizedLinear):
        if type(owner) is not nn.Linear:
            raise EngineError(f"{name}: quantized, but {type(owner).__name__} is not a plain linear layer")
        value.register_parameter("bias", owner.bias)
        model.set_submodule(path, value)
    elif leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _from_checkpoint(source: str | Path, config: ModelConfig, name: str, weight: SharedWeight) -> Tensor:
    """One tensor out of the checkpoint's safetensors files, on the host."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(file: str) -> str | None:
        return cached_file(str(source), file, revision=config.revision, _raise_exceptions_for_missing_entries=False)

    index = find("model.safetensors.index.json")
    file = json.loads(Path(index).read_text())["weight_map"].get(name) if index else "model.safetensors"
    path = find(file) if file else None
    if path is not None:
        with safe_open(path, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 — not a dictionary
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.shape == weight.shape:
                    return tensor
    raise EngineError(f"{name}: {source} holds no plain tensor of that name and shape to make a private copy of")


def _prove(model: nn.Module, mapped: Mapping[str, Tensor]) -> None:
    """Nothing is left without storage, and every mapped tensor is in the model as it is."""
    empty = [name for name, tensor in frozen_tensors(model).items() if tensor.is_meta]
    assert not empty, f"{empty[0]} has no storage"
    held = {tensor.name for tensor in storage_report(model, mapped) if tensor.shared}
    copied = [name for name in mapped if name not in held]
    assert not copied, f"{copied[0]} was copied"


def _compare_bytes(shared: SharedWeights, mapped: Mapping[str, Tensor]) -> None:
    found = dict(zip(mapped, checksums(list(mapped.values()))))
    nf4 = checksum(nf4_code(torch.device("cpu"))) if any(weight.scheme == "nf4" for weight in shared.values()) else None
    for name, weight in shared.items():
        for part in weight.tensors:
            given = weight.checksums.get(part)
            key = name if part == "weight" else f"{name}.{part}"
            if given != found[key]:
                raise _misfit(name, weight, f"reads otherwise here than in the engine ({part}: {found[key]}, {given})")
            if part == "code" and found[key] != nf4:
                raise _misfit(name, weight, "has another code book than bitsandbytes' NF4")


def _misfit(name: str, weight: SharedWeight, what: str) -> EngineError:
    return EngineError(f"{name}: the engine's copy ({weight.origin}) {what}")
