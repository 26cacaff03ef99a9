"""A model's architecture without its weights: built on the meta device, so that every number in it can be counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from posttrain.rl.config import LoraConfig, ModelConfig


def meta_model(config: ModelConfig) -> Any:
    """The transformers model of a configuration, without storage."""
    import torch
    from transformers import AutoModelForCausalLM

    described = _transformers_config(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described, trust_remote_code=config.trust_remote_code)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise ConfigError(f"{_called(config)} cannot be built as a causal LM: {_first_line(error)}") from None
    model.tie_weights()
    return model


def lora_parameters(model: nn.Module, lora: LoraConfig) -> int:
    """Numbers in the adapter: ``rank · (in + out)`` for each layer it stands beside."""
    layers = linear_layers(model)
    if lora.target_modules != "all-linear":
        wanted = lora.target_modules
        layers = {
            name: layer
            for name, layer in layers.items()
            if any(name == target or name.endswith(f".{target}") for target in wanted)
        }
        if not layers:
            known = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
            raise ConfigError(f"trainer.lora.target_modules {wanted} names no layer; it has: {', '.join(known)}")
    return sum(lora.rank * sum(layer.weight.shape) for layer in layers.values())


def linear_layers(model: Any) -> dict[str, Any]:
    """Every linear layer but the head; GPT-2's Conv1D is one."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head
    }


def _transformers_config(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    if config.random is not None:
        vocabulary = len(set(config.random.characters)) + 2 if config.random.characters else None
        fields = {**({"vocab_size": vocabulary} if vocabulary else {}), **config.random.config}
        try:
            return AutoConfig.for_model(**fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.random.config: {_first_line(error)}") from None
    assert config.name is not None
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.name: {folder} has no config.json, so it is not a transformers model")
    elif config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise ConfigError(
            f"model.name: there is no folder {config.name}; give a local folder or a hub name (owner/model)"
        )
    try:
        return AutoConfig.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model.name: {config.name} is neither a local folder nor a model on the hub: {_first_line(error)}"
        ) from None


def stored_size(config: ModelConfig, described: Any) -> int | None:
    """Bytes on disk of a checkpoint that is already quantized, where it is local; in memory it takes the same."""
    if getattr(described, "quantization_config", None) is None or config.name is None:
        return None
    folder = Path(config.name).expanduser()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return int(json.loads(index.read_text())["metadata"]["total_size"])
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None


def _called(config: ModelConfig) -> str:
    return f"model.name: {config.name}" if config.name else "model.random"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
