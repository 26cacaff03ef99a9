"""What the trainer writes into a checkpoint's folder and reads back, under peft's and transformers' file names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.rl.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
TRAINER_STATE = "trainer.pt"
FORMAT = 1


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write an adapter as peft would."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(folder: Path, weights: Mapping[str, nn.Parameter], config: Mapping[str, Any]) -> None:
    """Copy a saved adapter into ``weights``; checked in full before the first weight changes.

    Raises ``CheckpointError`` naming the first difference in rank, scaling, targets or shapes.
    """
    saved_config = _read_config(folder / ADAPTER_CONFIG)
    for key, label in (("r", "rank"), ("lora_alpha", "alpha"), ("use_rslora", "rank_stabilized")):
        saved, ours = saved_config.get(key), config.get(key)
        same = (
            math.isclose(saved, ours)
            if isinstance(saved, int | float) and isinstance(ours, int | float)
            else saved == ours
        )
        if not same:
            raise CheckpointError(
                f"{folder}: the adapter has {label} {saved}, this run's trainer.lora.{label} is {ours}"
            )
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: {error}; the checkpoint is incomplete") from None
    _compare(folder, tensors, weights)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])


def save_model(folder: Path, model: PreTrainedModel) -> None:
    """Write every weight as transformers would (full fine-tuning)."""
    model.save_pretrained(folder)


def load_model(folder: Path, weights: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
    """Copy a saved model into ``weights``; transformers reads it, since it may rename tensors on disk."""
    from transformers import AutoModelForCausalLM

    try:
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no complete model in it ({str(error).splitlines()[0]})") from None
    tensors = dict(saved.named_parameters())
    _compare(folder, tensors, weights)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write optimizer, version and random state."""
    torch.save({"format": FORMAT, **state}, folder / TRAINER_STATE)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote; never runs code from the file. Raises ``CheckpointError`` if it is not there."""
    path = folder / TRAINER_STATE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the folder holds no trainer state to continue from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the broken file makes its unpickler and zip reader raise
        raise CheckpointError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); use an older checkpoint"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: written by another version of posttrain; continue with that one")
    return state


def random_state() -> dict[str, Any]:
    """Torch's global random states, host and GPU."""
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"host": torch.get_rng_state(), "gpu": gpu}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Undo everything since the matching ``random_state``; GPU states only where there are as many GPUs."""
    torch.set_rng_state(state["host"])
    if torch.cuda.is_available() and len(state["gpu"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["gpu"])


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; the checkpoint is incomplete") from None


def _compare(folder: Path, tensors: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> None:
    """Same names, same shapes, or a ``CheckpointError`` that says which differ."""
    missing = [name for name in weights if name not in tensors]
    unknown = [name for name in tensors if name not in weights]
    if missing or unknown:
        parts = [f"it lacks {missing[0]} ({len(missing)} in all)"] if missing else []
        parts += [f"it has {unknown[0]} ({len(unknown)} in all), which this run does not train"] if unknown else []
        raise CheckpointError(f"{folder}: trained on other modules: {'; '.join(parts)}")
    for name, weight in weights.items():
        if tensors[name].shape != weight.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(tensors[name].shape)}, this run's is {list(weight.shape)}"
            )
