"""How much memory a configuration needs, worked out before any weight is loaded.

Weights, adapter, gradients and optimizer are counted exactly on a model without storage (the meta device); activations
and the KV cache are the largest the configuration allows. Sizes in bytes; T packed tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.rl import machine
from posttrain.rl.errors import ConfigError
from posttrain.rl.machine import GIB

if TYPE_CHECKING:
    from torch import nn

    from posttrain.rl.config import Config, LoraConfig, ModelConfig

RUNTIME = GIB // 2
"""What torch itself takes: the CUDA context, or the libraries in main memory."""
TILE = 4096
"""Rows and columns of the logits worked on at once (float32), the defaults of ``kernels.reference.token_logprobs``."""


@dataclass(slots=True, frozen=True)
class Memory:
    """What there is to fill."""

    kind: Literal["cpu", "cuda"]
    name: str
    total: int
    free: int
    capability: tuple[int, int] | None = None


@dataclass(slots=True, frozen=True)
class MemoryEstimate:
    """Bytes by use. ``fixed`` is exact, ``varying`` the largest the configuration allows."""

    parameters: int
    """Numbers in the base model."""
    trainable: int
    """Numbers that are trained."""
    weights: int
    sampler: int
    """A second copy of the weights for sampling, or vLLM's share of the GPU."""
    adapter: int
    """Of full fine-tuning in half precision: the float32 masters."""
    gradients: int
    optimizer: int
    activations: int
    """Of the largest micro-batch, with the log-probabilities of its tokens."""
    kv_cache: int
    overlapped: bool = False
    """Sampling goes on while the trainer works (``rollout.max_staleness``)."""

    @property
    def fixed(self) -> int:
        """Held all the time."""
        return RUNTIME + self.weights + self.sampler + self.adapter + self.gradients + self.optimizer

    @property
    def varying(self) -> int:
        """At the worst moment; sampling and training take turns unless they overlap."""
        both = (self.activations, self.kv_cache)
        return sum(both) if self.overlapped else max(both)

    @property
    def total(self) -> int:
        """The peak."""
        return self.fixed + self.varying

    def describe(self) -> str:
        """One line with the parts."""
        parts = {
            "weights": self.weights,
            "sampler": self.sampler,
            "adapter": self.adapter,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "KV cache": self.kv_cache,
        }
        shown = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
        return (
            f"{self.parameters / 1e6:,.4g}M parameters, {self.trainable / 1e6:,.4g}M trained, "
            f"{_gib(self.total)} in all: {shown}"
        )


def available(device: str = "auto") -> Memory | None:
    """The memory training will live in; ``None`` where the system gives no figure."""
    found = machine.gpus() if device != "cpu" else []
    if device == "cuda" and not found:
        raise ConfigError('trainer.device = "cuda", but no GPU is visible: set it to "cpu", or see posttrain doctor')
    if found:
        gpu = found[0]
        if gpu.total is None or gpu.free is None:
            return None
        return Memory("cuda", gpu.name, gpu.total, gpu.free, gpu.capability)
    main = machine.memory()
    return Memory("cpu", "main memory", *main) if main else None


def check_fits(config: Config, memory: Memory | None = None, *, longest_prompt: int = 0) -> MemoryEstimate:
    """Estimate, and raise ``ConfigError`` with the figures where it cannot fit.

    Refused when the exact part and half of the varying one exceed what is free: the other half is for completions,
    which rarely all reach their limit. ``memory`` by default is that of this machine; ``longest_prompt`` in tokens, 0
    while the data has not been read.
    """
    memory = memory or available(config.trainer.device)
    estimate = estimate_memory(config, memory, longest_prompt=longest_prompt)
    if memory and estimate.fixed + estimate.varying // 2 > memory.free:
        raise ConfigError(
            f"{config.model.name or 'model.random'} does not fit into the {_gib(memory.free)} free of "
            f"{_gib(memory.total)} ({memory.name}): {estimate.describe()}; {_remedy(config, estimate, memory)}"
        )
    return estimate


def estimate_memory(
    config: Config, memory: Memory | None = None, *, longest_prompt: int | None = None
) -> MemoryEstimate:
    """What ``config`` takes on ``memory``; raises ``ConfigError`` for a model that is not there.

    ``longest_prompt``: tokens, by default ``data.max_prompt_tokens``.
    """
    model = meta_model(config.model)
    length = config.max_model_len
    if longest_prompt is not None:
        length = min(length, longest_prompt + config.rollout.max_tokens)
    on_gpu = memory is not None and memory.kind == "cuda"
    size = _element_size(config.model.dtype, memory)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = _stored_size(config.model, model.config) or parameters * size
    trainer = config.trainer
    wide = max(4, size)  # half precision is trained through float32: the adapter, or a master of every weight
    if trainer.method == "lora":
        trainable = lora_parameters(model, trainer.lora)
        adapter = wide * trainable
    else:
        trainable = parameters
        adapter = wide * trainable if size < 4 else 0
    gradients = wide * trainable
    moments = 2 * trainable * (1 if trainer.optimizer == "adamw_8bit" else wide)
    engine = config.rollout.engine
    uses_vllm = engine == "vllm" or (engine == "auto" and on_gpu and importlib.util.find_spec("vllm") is not None)
    if uses_vllm:
        sampler = int(config.rollout.gpu_memory_utilization * memory.total) if memory and on_gpu else weights
    else:
        # One process shares one copy, except where training overwrites it.
        sampler = weights if config.placement == "ray" or trainer.method == "full" else 0
    return MemoryEstimate(
        parameters=parameters,
        trainable=trainable,
        weights=weights,
        sampler=sampler,
        adapter=adapter,
        gradients=gradients,
        optimizer=moments,
        activations=_activations(config, model, size, length),
        kv_cache=0 if uses_vllm else _kv_cache(config, model.config, size, length),
        overlapped=config.rollout.max_staleness > 0,
    )


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
    layers = _linear_layers(model)
    if lora.target_modules != "all-linear":
        wanted = lora.target_modules
        layers = {
            name: layer
            for name, layer in layers.items()
            if any(name == target or name.endswith(f".{target}") for target in wanted)
        }
        if not layers:
            known = sorted({name.rpartition(".")[2] for name in _linear_layers(model)})
            raise ConfigError(f"trainer.lora.target_modules {wanted} names no layer; it has: {', '.join(known)}")
    return sum(lora.rank * sum(layer.weight.shape) for layer in layers.values())


def _linear_layers(model: Any) -> dict[str, Any]:
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


def _stored_size(config: ModelConfig, described: Any) -> int | None:
    """Bytes on disk of a checkpoint that is already quantized, where it is local; in memory it takes the same."""
    if getattr(described, "quantization_config", None) is None or config.name is None:
        return None
    folder = Path(config.name).expanduser()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return int(json.loads(index.read_text())["metadata"]["total_size"])
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None


def _element_size(dtype: str, memory: Memory | None) -> int:
    """Bytes of one weight; auto is two on a GPU and four on a CPU."""
    sizes = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
    return sizes.get(dtype) or (2 if memory is not None and memory.kind == "cuda" else 4)


def _activations(config: Config, model: Any, size: int, length: int) -> int:
    """What the backward pass of the largest micro-batch keeps.

    A decoder layer keeps about what goes into and comes out of each of its matrix products, and its norms' inputs in
    float32; with checkpointing one layer at a time is whole, the others keep their input.
    """
    text = model.config.get_text_config()
    rollout, trainer = config.rollout, config.trainer
    everything = rollout.prompts_per_step * rollout.group_size * length // trainer.updates_per_batch
    tokens_T = min(everything, max(trainer.micro_batch_tokens, length))
    hidden, layers = text.hidden_size, text.num_hidden_layers
    products = sum(sum(layer.weight.shape) for layer in _linear_layers(model).values()) * size // layers
    active = getattr(text, "num_experts_per_tok", None) or 0
    if active:  # experts are stacked in one parameter: gate, up and down of those that a token visits
        width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        products += active * (2 * hidden + 4 * width) * size
    one_layer = products + 4 * hidden * 4
    kept = one_layer + layers * hidden * size if trainer.activation_checkpointing else layers * one_layer
    tile = min(tokens_T, TILE) * min(text.vocab_size, TILE) * 4
    return tokens_T * (kept + 3 * hidden * 4) + 3 * tile


def _kv_cache(config: Config, described: Any, size: int, length: int) -> int:
    """Keys and values of the sequences decoded at once, at their longest; sliding windows counted whole."""
    text = described.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows = min(config.rollout.max_sequences, config.rollout.prompts_per_step * config.rollout.group_size)
    cache = 2 * rows * length * text.num_hidden_layers * heads * width * size
    return cache + rows * text.vocab_size * 4  # and the logits of one token each


def _remedy(config: Config, estimate: MemoryEstimate, memory: Memory) -> str:
    """What would help most."""
    if estimate.fixed <= memory.free:
        if estimate.kv_cache > estimate.activations:
            return "lower rollout.max_sequences, data.max_prompt_tokens or rollout.max_tokens"
        if not config.trainer.activation_checkpointing:
            return "set trainer.activation_checkpointing = true, or lower trainer.micro_batch_tokens"
        return "lower trainer.micro_batch_tokens or rollout.max_tokens"
    if config.trainer.method == "full":
        return 'use trainer.method = "lora" or a smaller model'
    if memory.kind == "cuda" and estimate.sampler > estimate.weights:
        return "lower rollout.gpu_memory_utilization, or use a smaller model"
    return 'use a smaller model, or model.dtype = "bfloat16"'


def _called(config: ModelConfig) -> str:
    return f"model.name: {config.name}" if config.name else "model.random"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB // 100 else f"{size / machine.MIB:.2f} MiB"
