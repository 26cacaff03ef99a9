"""Whether a run fits, and how one GPU is divided between vLLM's KV cache and the trainer. Sizes in bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.rl import claims, machine
from posttrain.rl.errors import ConfigError, EngineError
from posttrain.rl.footprint import MemoryEstimate, estimate_memory, uses_vllm
from posttrain.rl.machine import GIB, Gpu, Memory, gib

if TYPE_CHECKING:
    from posttrain.rl.config import Config

__all__ = [
    "Memory",
    "MemoryEstimate",
    "MemorySplit",
    "available",
    "budget",
    "check_fits",
    "estimate_memory",
    "settled",
    "split",
]

SHARE = 95
"""Percent of what is free that a run takes unless told; the rest is for fragments, and for what others start."""

FP8_SINCE = (8, 9)
"""Compute capability whose tensor cores multiply float8 (Ada)."""


@dataclass(slots=True, frozen=True)
class MemorySplit:
    """One GPU, shared by vLLM and the trainer."""

    budget: int
    """All that the run may take."""
    weights: int
    """Of the base model, once."""
    engine: int
    """vLLM beside weights and KV cache."""
    kv_cache: int
    """For vLLM's KV cache."""
    trainer: int
    """Limit of the trainer's allocator: adapter, gradients, optimizer, activations; mapped weights do not count."""
    sequences: int
    """Sequences that vLLM decodes at once, at most."""
    needed: MemoryEstimate
    """What it was worked out from."""

    @property
    def peak(self) -> int:
        """The most that will be taken at once."""
        return min(self.budget, self.needed.total)

    def describe(self) -> str:
        """One line with the parts."""
        needed = self.needed
        turns = "both at once" if needed.overlapped else "in turn"
        return (
            f"{needed.numbers()}, {gib(self.budget)} to share: weights {gib(self.weights)}, "
            f"engine {gib(self.engine)}, then {turns} KV cache {gib(self.kv_cache)} "
            f"({self.sequences} sequences could use {gib(needed.kv_cache)}) and trainer {gib(self.trainer)} "
            f"(needs {gib(needed.training)} and for {needed.kind_of_activations} at most {gib(needed.activations)})"
        )


def available(device: str = "auto", gpus: int = 1) -> Memory | None:
    """The memory training will live in, of several GPUs that of the fullest; ``None`` where the system gives no figure.
    What other runs have claimed is not free.

    Raises ``ConfigError`` for GPUs that are not there.
    """
    found = machine.gpus() if device != "cpu" else []
    if device == "cuda" and not found:
        raise ConfigError('trainer.device = "cuda", but no GPU is visible: set it to "cpu", or see posttrain doctor')
    if found and len(found) < gpus and "RAY_ADDRESS" not in os.environ:  # a cluster's GPUs are elsewhere
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        cause = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise ConfigError(f"gpus = {gpus}, but this machine shows {len(found)}{cause}: lower gpus")
    if not found:
        main = machine.memory()
        return Memory("cpu", "main memory", *main) if main else None
    sizes = [memory for memory in map(_memory, found[:gpus]) if memory is not None]
    return min(sizes, key=lambda memory: memory.free, default=None)


def _memory(gpu: Gpu) -> Memory | None:
    if gpu.total is None or gpu.free is None:
        return None
    others = claims.live(gpu)
    free = claims.unclaimed(gpu.total, gpu.free, gpu, others)
    return Memory("cuda", gpu.name, gpu.total, free, gpu.capability, gpu.index, gpu.processes, others)


def budget(config: Config, memory: Memory) -> int:
    """What the run may take of ``memory``."""
    if memory.kind == "cpu":
        return memory.free
    return int(config.gpu_memory_gib * GIB) if config.gpu_memory_gib else memory.free * SHARE // 100


def settled(config: Config, memory: Memory | None) -> Config:
    """``config`` with ``trainer.activation_checkpointing`` true or false: auto is true where the largest micro-batch
    does not fit into a GPU without, beside all that is there at the same time.
    """
    if config.trainer.activation_checkpointing != "auto":
        return config
    fits = True
    if memory is not None and memory.kind == "cuda":
        needed = estimate_memory(config, memory)
        beside = needed.kv_cache if needed.overlapped else 0
        fits = needed.fixed + needed.activations + beside <= budget(config, memory)
    trainer = config.trainer.model_copy(update={"activation_checkpointing": not fits})
    return config.model_copy(update={"trainer": trainer})


def split(config: Config, memory: Memory) -> MemorySplit:
    """Divide a GPU between vLLM and the trainer; raises ``ConfigError`` with the figures where it cannot be.

    ``memory`` as it was before either started. When they take turns, the KV cache may have all but what the trainer
    always holds, and the trainer all but the engine; at once, the largest micro-batch goes first and the KV cache
    has what is left, at least one sequence. ``rollout.kv_cache_gib`` wins.
    """
    assert memory.kind == "cuda", "only a GPU is divided"
    needed = check_fits(config, memory)
    limit = budget(config, memory)
    room = limit - needed.weights - needed.sampler - needed.engine - needed.runtime
    left = room - needed.training - (needed.activations if needed.overlapped else 0)
    kv_cache = min(needed.kv_cache, max(left, needed.kv_least))
    trainer = room - kv_cache if needed.overlapped else room
    return MemorySplit(limit, needed.weights, needed.engine, kv_cache, trainer, needed.sequences, needed)


def check_fits(config: Config, memory: Memory | None = None, *, longest_prompt: int = 0) -> MemoryEstimate:
    """Estimate, and raise ``ConfigError`` with the figures where the least it needs cannot be had.

    ``memory`` by default is that of this machine; ``longest_prompt`` in tokens, 0 while the data has not been read
    (vLLM makes room for ``data.max_prompt_tokens`` from the start).
    """
    memory = memory or available(config.trainer.device, config.gpus)
    config = settled(config, memory)
    vllm = uses_vllm(config, memory is not None and memory.kind == "cuda")
    if vllm and memory is not None and memory.kind == "cuda":
        _check_shareable(config, memory)
    needed = estimate_memory(config, memory, longest_prompt=None if vllm else longest_prompt)
    if memory is not None and not needed.least <= budget(config, memory) <= memory.free:
        raise ConfigError(_refusal(config, needed, memory))
    main = machine.memory() if needed.pinned else None
    if main is not None and needed.pinned > main[1]:
        raise ConfigError(
            f"trainer.offload_activations takes {gib(needed.pinned)} of main memory, {gib(main[1])} of {gib(main[0])} "
            "are free: lower trainer.micro_batch_tokens, or set it to false"
        )
    return needed


def _check_shareable(config: Config, memory: Memory) -> None:
    """Whether the trainer can use vLLM's weights. Before Ada vLLM keeps fp8 ones in a form that only its own kernel
    reads.
    """
    if (problem := machine.no_weight_sharing()) is not None:
        raise EngineError(f"the trainer cannot map vLLM's weights: {problem}")
    known = memory.capability
    if config.model.quantization == "fp8" and known is not None and known < FP8_SINCE:
        raise EngineError(
            'model.quantization = "fp8" with vLLM needs compute capability {}.{}, '.format(*FP8_SINCE)
            + '{} has {}.{}: use "nf4", or rollout.engine = "transformers"'.format(memory.name, *known)
        )


def _refusal(config: Config, needed: MemoryEstimate, memory: Memory) -> str:
    """Why not, in figures, and what to do."""
    limit, given = budget(config, memory), config.gpu_memory_gib
    if memory.kind == "cuda" and limit > memory.total:
        return f"gpu_memory_gib = {given:g}, but {memory.name} has {gib(memory.total)}: lower it"
    empty = limit if given else memory.total * SHARE // 100
    if memory.kind == "cuda" and needed.least <= empty:  # it would fit, were the GPU not in use
        return _busy(config, needed, memory)
    held = f"{gib(limit)} of gpu_memory_gib" if memory.kind == "cuda" and given else f"{gib(memory.free)} free"
    return (
        f"{config.model.name or 'model.random'} does not fit into the {held} of {gib(memory.total)} ({memory.name}): "
        f"{needed.describe()}; {_remedy(config, needed, limit)}"
    )


def _busy(config: Config, needed: MemoryEstimate, memory: Memory) -> str:
    """Who has the GPU's memory."""
    if config.gpu_memory_gib:
        wants = f"this run may take {config.gpu_memory_gib:.1f} (gpu_memory_gib)"
        remedy = "stop it, or lower gpu_memory_gib"
    else:
        wants = f"this run needs at least {needed.least / GIB:.1f} ({needed.parts(least=True)})"
        remedy = "stop it, or lower its gpu_memory_gib"
    free = f"{memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB free{' and not claimed' if memory.claims else ''}"
    holders = ", ".join([*(claim.describe() for claim in memory.claims), *(one.describe() for one in memory.processes)])
    return (
        f"GPU {memory.index} ({memory.name}): {free}, {wants}: {holders or 'another process holds the rest'}; {remedy}"
    )


def _remedy(config: Config, needed: MemoryEstimate, limit: int) -> str:
    """What would help most."""
    lora = config.trainer.method == "lora"
    if needed.fixed > limit:
        if not lora:
            return 'use trainer.method = "lora" or a smaller model'
        if config.model.quantization == "none":
            return 'use a smaller model, or model.quantization = "nf4"'
        return "use a smaller model"
    if needed.overlapped and needed.fixed + max(needed.activations // 2, needed.kv_least) <= limit:
        return "set rollout.max_staleness = 0, so that sampling and training take turns"
    if needed.kv_least > needed.activations // 2:
        if config.rollout.kv_cache_gib:
            return "lower rollout.kv_cache_gib"
        fewer = "" if needed.engine else "rollout.max_sequences, "  # vLLM asks for one sequence in any case
        return f"lower {fewer}data.max_prompt_tokens or rollout.max_tokens"
    if not config.trainer.activation_checkpointing:
        return "set trainer.activation_checkpointing = true, or lower trainer.micro_batch_tokens"
    return "lower trainer.micro_batch_tokens or rollout.max_tokens"
