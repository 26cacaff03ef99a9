"""The byte model: what a configuration holds in memory, worked out before any weight is loaded.

Weights, adapter, gradients and optimizer are counted exactly on a model without storage; activations and the KV cache
are the largest the configuration allows; what CUDA and vLLM take beside them are the constants below, each with its
source. Sizes in bytes; H hidden, I the widest layer.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.rl.activations import count_activations
from posttrain.rl.architecture import linear_layers, lora_parameters, meta_model, stored_size
from posttrain.rl.errors import ConfigError
from posttrain.rl.machine import GIB, MIB, Memory, gib

if TYPE_CHECKING:
    from posttrain.rl.config import Config

RUNTIME = 640 * MIB
"""What torch itself takes in each process: the CUDA context, or the libraries in main memory. A bare context: 617 MiB,
measured on an H200, 2026-11-22, vLLM 0.26, torch 2.11."""
BESIDE = 200 * MIB
"""What a trainer on a GPU takes beside context, weights and adapter: kernels, buffers, fragments. 70 to 200 MiB,
measured on an H200, 2026-11-22, vLLM 0.26, torch 2.11."""
NCCL = GIB // 2
"""Device memory of NCCL's buffers and channels in each of several trainers, outside torch's allocator. An estimate."""
NF4_BLOCK = 64
"""Weights that share one float32 absmax (bitsandbytes' default, not nested)."""
NF4_CODE = 16 * 4
"""Its code book, float32, one a layer."""
FP8_SCALE = 4
"""One float32 a layer (vLLM's online fp8)."""
BATCHED_TOKENS = 8192
"""Tokens of one forward pass of vLLM at most; with more of them waiting it takes several."""
GRAPHS = 5 * MIB // 8
"""CUDA graphs of one layer at one batch size, piecewise and in full: they hold every kernel's launch parameters. 0.23
GiB for 11 sizes of 36 layers, measured on an H200, 2026-11-22, vLLM 0.26, torch 2.11; all that vLLM took beside weights
and KV cache was 1.36 GiB there, the model below says 1.49."""
MOST_CAPTURED = 512
"""The largest batch that a CUDA graph is captured for."""
LARGE_GPU = 70 * GIB
"""From here on, the A100 apart, vLLM decodes 1,024 sequences at once, else 256 (``EngineArgs.get_batch_defaults``)."""
KV_BLOCK = 64
"""Tokens that the cache of a sequence is rounded up to: vLLM's blocks have 16, some attention backends ask for 64."""


@dataclass(slots=True, frozen=True)
class MemoryEstimate:
    """Bytes by use. ``fixed`` is exact but for ``runtime`` and ``engine``, ``varying`` the most there can be."""

    parameters: int
    """Numbers in the base model."""
    trainable: int
    """Numbers that are trained."""
    weights: int
    """Of the base model, quantized as asked, once."""
    sampler: int
    """A second copy of the weights for sampling, where it cannot be shared."""
    engine: int
    """vLLM beside weights and KV cache: context, CUDA graphs, activations, its copy of the adapter."""
    runtime: int
    """Of the processes other than vLLM's."""
    adapter: int
    """Of full fine-tuning in half precision: the float32 masters."""
    gradients: int
    optimizer: int
    publication: int
    """The buffer through which vLLM gets the adapter."""
    activations: int
    """Of the largest micro-batch, with the log-probabilities of its tokens and one dequantized layer."""
    pinned: int
    """Beside them, in the host's memory: what ``trainer.offload_activations`` moves there."""
    kv_cache: int
    """The most that the run can use."""
    kv_least: int
    """Without which it cannot run: vLLM asks for one sequence at its longest."""
    sequences: int
    """Sequences that one engine decodes at once."""
    recomputed: bool
    """Activations are, in the backward pass (``trainer.activation_checkpointing``)."""
    overlapped: bool
    """Sampling goes on while the trainer works (``rollout.max_staleness``)."""

    @property
    def training(self) -> int:
        """What the trainer's allocator always holds beside the weights."""
        return self.adapter + self.gradients + self.optimizer + self.publication

    @property
    def fixed(self) -> int:
        """Held all the time."""
        return self.weights + self.sampler + self.engine + self.runtime + self.training

    @property
    def varying(self) -> int:
        """At the worst moment; sampling and training take turns unless they overlap."""
        both = (self.activations, self.kv_cache)
        return sum(both) if self.overlapped else max(both)

    @property
    def total(self) -> int:
        """The peak."""
        return self.fixed + self.varying

    @property
    def least(self) -> int:
        """What it must have. Half of the largest micro-batch: the other half is for completions, which rarely all
        reach their limit, and a micro-batch that does not fit is halved.
        """
        both = (self.activations // 2, self.kv_least)
        return self.fixed + (sum(both) if self.overlapped else max(both))

    def describe(self) -> str:
        """One line with the parts."""
        return f"{self.numbers()}, {gib(self.total)} in all: {self.parts()}"

    def numbers(self) -> str:
        """How many parameters."""
        return f"{self.parameters / 1e6:,.4g}M parameters, {self.trainable / 1e6:,.4g}M trained"

    @property
    def kind_of_activations(self) -> str:
        """What to call them."""
        return "recomputed activations" if self.recomputed else "activations"

    def parts(self, *, least: bool = False) -> str:
        """Every part that is not empty, at its most or its least."""
        parts = {
            "weights": self.weights,
            "sampler": self.sampler,
            "engine": self.engine,
            "adapter": self.adapter,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            self.kind_of_activations: self.activations // 2 if least else self.activations,
            "KV cache": self.kv_least if least else self.kv_cache,
        }
        return ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)


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
    size = _element_size(config.model.dtype, on_gpu)
    trainer = config.trainer
    wide = max(4, size)  # half precision is trained through float32: the adapter, or a master of every weight
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if trainer.method == "lora":
        trainable = lora_parameters(model, trainer.lora)
        adapter = wide * trainable
    else:
        trainable = parameters
        adapter = wide * trainable if size < 4 else 0
    weights = _weights(config, model, size)
    vllm = uses_vllm(config, on_gpu)
    apart = config.placement == "ray" or config.gpus > 1 or vllm
    if vllm:
        twice = not on_gpu  # there the trainer maps vLLM's weights
    else:  # one process shares one copy, except where training overwrites it
        twice = apart or trainer.method == "full"
    sequences = _sequences(config, memory if vllm else None)
    cache = kv_bytes_per_token(model.config, size)
    if vllm:
        kv_cache, kv_least = _vllm_cache(config, cache, sequences)
    else:
        kv_cache = sequences * (length * cache + model.config.get_text_config().vocab_size * 4)  # and a token's logits
        kv_least = kv_cache // 2
    activations = count_activations(config, model, size, length, on_gpu)
    return MemoryEstimate(
        parameters=parameters,
        trainable=trainable,
        weights=weights,
        sampler=weights if twice else 0,
        engine=engine_bytes(config, model, sequences) if vllm and on_gpu else 0,
        runtime=_runtime(config, on_gpu, processes=2 if apart and not (vllm and on_gpu) else 1),
        adapter=adapter,
        gradients=wide * trainable,
        optimizer=2 * trainable * (1 if trainer.optimizer == "adamw_8bit" else wide),
        publication=trainable * size if vllm and on_gpu else 0,
        activations=activations.device + _dequantized(config, model),
        pinned=activations.host * config.gpus,
        kv_cache=kv_cache,
        kv_least=kv_least,
        sequences=sequences,
        recomputed=trainer.activation_checkpointing is True,
        overlapped=config.rollout.max_staleness > 0,
    )


def _runtime(config: Config, on_gpu: bool, processes: int) -> int:
    """Of the processes other than vLLM's, the trainer's among them."""
    trainer = BESIDE + (NCCL if config.gpus > 1 else 0)
    return processes * RUNTIME + (trainer if on_gpu else 0)


def uses_vllm(config: Config, on_gpu: bool) -> bool:
    """Whether vLLM samples: asked for, or on a GPU where it is installed."""
    if config.rollout.engine != "auto":
        return config.rollout.engine == "vllm"
    return on_gpu and config.trainer.method == "lora" and importlib.util.find_spec("vllm") is not None


def kv_bytes_per_token(described: Any, size: int) -> int:
    """Keys and values of one token in every layer; sliding windows are counted whole."""
    text = described.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * size


def _vllm_cache(config: Config, token: int, sequences: int) -> tuple[int, int]:
    """The most that the run can use, and the least it can do with; ``rollout.kv_cache_gib`` is both."""
    sequence = _in_blocks(config.max_model_len) * token
    if config.rollout.kv_cache_gib is None:
        return sequences * sequence, sequence
    given = int(config.rollout.kv_cache_gib * GIB)
    if given < sequence:
        raise ConfigError(
            f"rollout.kv_cache_gib = {config.rollout.kv_cache_gib:g} holds no sequence of {config.max_model_len} "
            f"tokens, which takes {gib(sequence)}: raise it, or lower data.max_prompt_tokens or rollout.max_tokens"
        )
    return given, given


def engine_bytes(config: Config, model: Any, sequences: int) -> int:
    """What vLLM takes beside the weights and the KV cache.

    Activations of the largest forward pass: the residual, a layer's input and
    output (3 H), the two halves of the widest layer and their product (3 I). Sampling: logits in the model's type,
    then in float32 the logits, log-probabilities, probabilities and the noise they are compared with.
    """
    size = _element_size(config.model.dtype, True)
    text = model.config.get_text_config()
    activations = BATCHED_TOKENS * 3 * (text.hidden_size + _widest(model)) * size
    sampling = sequences * text.vocab_size * (size + 4 * 4)
    sizes = [] if config.rollout.enforce_eager else capture_sizes(sequences)
    graphs = len(sizes) * text.num_hidden_layers * GRAPHS
    return (
        RUNTIME + graphs + max(activations, sampling) + _lora_slots(config, model) * size + _dequantized(config, model)
    )


def capture_sizes(sequences: int) -> list[int]:
    """Batch sizes to capture CUDA graphs for, ``sequences`` among them: at most an eighth of a batch is padding."""
    largest = min(sequences, MOST_CAPTURED)
    sizes = {1, 2, 4, largest}
    sizes |= {*range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, MOST_CAPTURED + 1, 64)}
    return sorted(size for size in sizes if size <= largest)


def _lora_slots(config: Config, model: Any) -> int:
    """Numbers in the engine's own copy of the adapter; vLLM's slots know the ranks 8, 16, 32, … only."""
    lora = config.trainer.lora
    if config.rollout.lora_backend == "slots":
        lora = lora.model_copy(update={"rank": max(8, 1 << (lora.rank - 1).bit_length())})
    return lora_parameters(model, lora)


def _sequences(config: Config, vllm_on: Memory | None) -> int:
    """Sequences that one engine decodes at once, at most; several engines share the prompts, each whole groups."""
    rollout, evaluation = config.rollout, config.evaluation
    wanted = -(-rollout.prompts_per_step // config.gpus) * rollout.group_size
    if vllm_on is None:
        return min(wanted, rollout.max_sequences)
    if evaluation.every:
        wanted = max(wanted, -(-evaluation.max_prompts // config.gpus) * evaluation.samples)
    large = vllm_on.total >= LARGE_GPU and "a100" not in vllm_on.name.lower()
    return min(wanted, 1024 if large else 256)


def _in_blocks(length: int) -> int:
    """Tokens of cache for one sequence: full blocks, and one more (vLLM keeps one block of the cache to itself)."""
    return (-(-length // KV_BLOCK) + 1) * KV_BLOCK


def _element_size(dtype: str, on_gpu: bool) -> int:
    """Bytes of one weight; auto is two on a GPU and four on a CPU."""
    sizes = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
    return sizes.get(dtype) or (2 if on_gpu else 4)


def _weights(config: Config, model: Any, size: int) -> int:
    """The base model: linear layers quantized as asked; embeddings, head, norms and biases dense."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stored = stored_size(config.model, model.config)
    if stored or config.model.quantization == "none":
        return stored or parameters * size
    layers = [layer.weight.numel() for layer in linear_layers(model).values()]
    dense = (parameters - sum(layers)) * size
    if config.model.quantization == "nf4":
        return dense + sum(-(-numel // 2) + -(-numel // NF4_BLOCK) * 4 + NF4_CODE for numel in layers)
    return dense + sum(layers) + FP8_SCALE * len(layers)


def _dequantized(config: Config, model: Any) -> int:
    """The largest linear layer in the model's type, while it is multiplied with."""
    if config.model.quantization == "none":
        return 0
    return max(layer.weight.numel() for layer in linear_layers(model).values()) * _element_size(
        config.model.dtype, True
    )


def _widest(model: Any) -> int:
    """Features of the widest linear layer, in or out."""
    return max(max(layer.weight.shape) for layer in linear_layers(model).values())
