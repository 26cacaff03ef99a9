"""LoRA through peft: names and files are peft's own, so that adapters travel both ways unchanged."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain.rl.errors import EngineError
from posttrain.trainer.quantized import QuantizedLinear

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from posttrain.rl.config import LoraConfig

ADAPTER = "default"
"""peft's own name for the only adapter of a model; it does not appear in exported names."""


def attach(causal_lm: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Put a fresh adapter (B = 0) on a model and freeze everything else.

    The adapter of a bfloat16 or float16 base is float32: at the learning rates of reinforcement learning most updates
    would round away in the base's type. ``seed`` decides A; the global random state is left as it was.
    """
    import peft

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        use_rslora=config.rank_stabilized,
        bias="none",
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft asks by the old name
        torch.manual_seed(seed)
        try:
            model = peft.get_peft_model(causal_lm, settings)
        except ValueError as error:
            raise EngineError(f"trainer.lora.target_modules = {config.target_modules}: {error}") from error
    if hasattr(causal_lm.get_output_embeddings(), "base_layer"):
        raise EngineError(
            "trainer.lora.target_modules reaches the output head, which is kept frozen: leave it out "
            '(target_modules = "all-linear" does)'
        )
    model.eval()
    return model


def weights(model: PeftModel) -> dict[str, nn.Parameter]:
    """Adapter parameters by the names peft saves them under."""
    return {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name and f".{ADAPTER}." in name
    }


def base_weights(causal_lm: PreTrainedModel) -> dict[str, nn.Parameter | QuantizedLinear]:
    """Parameters of the model under the adapter by the names they have without one; a quantized layer as it is."""
    layers = {
        name.removesuffix(".base_layer"): module
        for name, module in causal_lm.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    parameters = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in causal_lm.named_parameters()
        if ".lora_" not in name
    }
    dense = {name: weight for name, weight in parameters.items() if name.rpartition(".")[0] not in layers}
    return {**dense, **layers}


def scaling(model: PeftModel) -> float:
    """What the adapter's output is multiplied by: alpha/rank, or alpha/√rank when rank-stabilized."""
    settings = model.peft_config[ADAPTER]
    return settings.lora_alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r)


def adapter_config(model: PeftModel) -> dict[str, Any]:
    """Content of ``adapter_config.json``: what peft itself would write, in a fixed order."""
    settings = model.peft_config[ADAPTER].to_dict()
    settings["inference_mode"] = True
    return {key: _plain(settings[key]) for key in sorted(settings)}


def _plain(value: object) -> Any:
    """JSON's types; sets sorted, because their order changes from run to run; peft's enumerations are strings."""
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(getattr(value, "value", value)) if isinstance(value, str) else value
