"""What a configuration builds on this machine: which engine and trainer, with how many threads, in how much memory."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.rl.errors import EngineError
from posttrain.rl.machine import GIB, gib
from posttrain.rl.memory import available, estimate_memory, settled, split

if TYPE_CHECKING:
    from posttrain.rl.config import Config
    from posttrain.rl.types import SharedWeights
    from posttrain.trainer.distributed import Ranks

SMALL_MODEL_BYTES = 200_000_000
"""Below this a second CPU thread costs more than it brings."""


def engine_name(config: Config) -> str:
    """The engine that ``rollout.engine`` stands for on this machine; raises where it cannot run."""
    installed = importlib.util.find_spec("vllm") is not None
    wanted = config.rollout.engine
    if wanted == "vllm" and not installed:
        raise EngineError('rollout.engine = "vllm" needs vLLM: pip install "posttrain[vllm]", or use "transformers"')
    adapter = config.trainer.method == "lora"
    if wanted == "vllm" and not adapter:
        raise EngineError(
            'rollout.engine = "vllm" takes LoRA adapters only: use trainer.method = "lora" or '
            'rollout.engine = "transformers"'
        )
    if wanted == "auto":
        return "vllm" if installed and uses_gpu(config) and adapter else "transformers"
    return wanted


def uses_gpu(config: Config) -> bool:
    """Whether sampler and trainer work on a GPU; asking opens no CUDA context."""
    import torch

    return torch.cuda.is_available() and config.trainer.device != "cpu"


def uses_ray(config: Config) -> bool:
    """Whether sampler and trainer are Ray actors."""
    return config.placement == "ray" or (
        config.placement == "auto" and (config.gpus > 1 or engine_name(config) == "vllm")
    )


def check_installed(config: Config) -> None:
    """Before anything loads: raise ``EngineError`` where the engine or the optimizer cannot run on this machine."""
    engine_name(config)
    needs = {
        'trainer.optimizer = "adamw_8bit"': (config.trainer.optimizer == "adamw_8bit", '"adamw"'),
        'model.quantization = "nf4"': (config.model.quantization == "nf4", '"fp8" or "none"'),
    }
    for setting, (wanted, instead) in needs.items():
        if wanted and importlib.util.find_spec("bitsandbytes") is None:
            raise EngineError(f'{setting} needs bitsandbytes: pip install "posttrain[bnb]", or use {instead}')


def cpu_threads(config: Config, source: str) -> int:
    """Threads for each of sampler and trainer on a CPU."""
    if config.trainer.cpu_threads:
        return config.trainer.cpu_threads
    weights = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    if 0 < weights < SMALL_MODEL_BYTES:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2) if config.rollout.max_staleness else cores


@dataclass(slots=True, frozen=True)
class Room:
    """What the sampler may fill while it decodes; halved where that was too much."""

    kv_cache_bytes: int | None
    """vLLM's KV cache; ``None``: what vLLM itself works out, and none for the transformers engine."""
    sequences: int
    """Decoded at once, at most."""

    def halved(self) -> Room:
        """Half the cache where its size is given, else half the sequences; half of the smallest is the smallest."""
        if self.kv_cache_bytes is not None:
            return replace(self, kv_cache_bytes=self.kv_cache_bytes // 2)
        return replace(self, sequences=max(1, self.sequences // 2))

    def describe(self) -> str:
        """In the unit that counts."""
        if self.kv_cache_bytes is None:
            return f"{self.sequences} sequences at once"
        return f"{gib(self.kv_cache_bytes)} of KV cache"


@dataclass(slots=True, frozen=True)
class Blueprint:
    """How to build the sampler and the trainer of one pair."""

    config: Config
    source: str
    engine: str
    """``vllm`` or ``transformers``."""
    gpu: bool
    threads: int
    room: Room
    in_actors: bool
    trainer_bytes: int | None = None
    """What the trainer may allocate on a GPU that it shares with vLLM."""
    peak_bytes: int | None = None
    """The most that a pair takes of its GPU at once; ``None`` on a CPU."""

    @classmethod
    def of(cls, config: Config, source: str) -> Blueprint:
        """For this machine; raises ``EngineError`` or ``ConfigError`` where it cannot be built here."""
        name, gpu, rollout = engine_name(config), uses_gpu(config), config.rollout
        threads, in_actors = cpu_threads(config, source), uses_ray(config)
        memory = available(config.trainer.device, config.gpus) if gpu else None
        known = memory is not None and memory.kind == "cuda"  # the driver's tool gives figures
        model = config.model.model_copy(update={"name": source, "random": None})
        sized = settled(config.model_copy(update={"model": model}), memory)
        config = config.model_copy(update={"trainer": sized.trainer})
        if name == "vllm" and memory is not None and known:
            shares = split(sized, memory)
            room = Room(shares.kv_cache, shares.sequences)
            return cls(config, source, name, gpu, threads, room, in_actors, shares.trainer, shares.peak)
        if name == "vllm":
            cache = None if rollout.kv_cache_gib is None else int(rollout.kv_cache_gib * GIB)
            room = Room(cache, rollout.prompts_per_step * rollout.group_size)
        else:
            room = Room(None, rollout.max_sequences)
        peak = estimate_memory(sized, memory).total if known else None
        return cls(config, source, name, gpu, threads, room, in_actors, None, peak)

    def halved(self) -> Blueprint:
        """With half the room for the sampler."""
        return replace(self, room=self.room.halved())

    @property
    def engine_lends(self) -> bool:
        """The engine owns the base weights and the trainer, on the same GPU, maps them."""
        return self.engine == "vllm" and self.gpu

    @property
    def trainer_lends(self) -> bool:
        """The trainer owns the base weights and the engine, in the same process, uses them."""
        return self.engine == "transformers" and not self.in_actors and self.config.trainer.method == "lora"

    def make_sampler(self, base_weights: Mapping[str, Any] | None) -> Callable[[], Any]:
        """What builds the engine; ``base_weights``: those that the trainer lends."""
        config = self.config
        length = {"max_model_len": config.max_model_len}
        if self.engine == "transformers":
            from posttrain.rollout.transformers_engine import TransformersEngine

            rollout = config.rollout.model_copy(update={**length, "max_sequences": self.room.sequences})
            make = partial(TransformersEngine, self.source, config.model, rollout, device=config.trainer.device)
            return make if base_weights is None else partial(make, base_weights=base_weights)
        from posttrain.rollout.vllm_engine import VllmEngine

        return partial(
            VllmEngine,
            self.source,
            config.model,
            config.rollout.model_copy(update=length),
            lora_rank=config.trainer.lora.rank,
            lora_targets=config.trainer.lora.target_modules,
            kv_cache_bytes=self.room.kv_cache_bytes,
            sequences=self.room.sequences,
            in_process=self.in_actors,
        )

    def make_trainer(self, shared: SharedWeights | None, ranks: Ranks | None) -> Callable[[], Any]:
        """What builds the trainer; ``shared``: the weights that the engine lends."""
        from posttrain.trainer.trainer import Trainer

        return partial(
            Trainer,
            self.source,
            self.config.model,
            self.config.trainer,
            seed=self.config.seed,
            shared=shared,
            memory_limit=self.trainer_bytes,
            ranks=ranks,
        )
