"""Where the sampler and the trainer live: both in this process around one copy of the base, or in two Ray actors."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.rl.errors import EngineError
from posttrain.rl.service.handles import LearnerHandle, SamplerHandle

if TYPE_CHECKING:
    from posttrain.rl.config import Config
    from posttrain.rl.service.handles import Caller

SMALL_MODEL_BYTES = 200_000_000
"""Below this a second CPU thread costs more than it brings."""


def engine_name(config: Config) -> str:
    """The engine that ``rollout.engine`` stands for on this machine; raises where it cannot run."""
    import torch

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
        on_gpu = torch.cuda.is_available() and config.trainer.device != "cpu"
        return "vllm" if installed and on_gpu and adapter else "transformers"
    return wanted


def cpu_threads(config: Config, source: str) -> int:
    """Threads for each of sampler and trainer on a CPU."""
    if config.trainer.cpu_threads:
        return config.trainer.cpu_threads
    weights = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    if 0 < weights < SMALL_MODEL_BYTES:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2) if config.rollout.max_staleness else cores


@asynccontextmanager
async def place(config: Config, source: str) -> AsyncIterator[tuple[SamplerHandle, LearnerHandle]]:
    """Start sampler and trainer as ``config.placement`` says; both are closed on leaving, whatever happened."""
    async with AsyncExitStack() as stack:
        if config.placement == "ray":
            from posttrain.rl.service.actors import ray_session

            stack.enter_context(ray_session())
            sampler, learner = await _actors(config, source)
        else:
            sampler, learner = _embedded(config, source)
        stack.push_async_callback(learner.close)
        stack.push_async_callback(sampler.close)
        yield SamplerHandle(sampler), LearnerHandle(learner)


def _embedded(config: Config, source: str) -> tuple[Caller, Caller]:
    """Both in this process; a LoRA run on the transformers engine holds the base weights once."""
    from posttrain.rl.service.local import ThreadCaller
    from posttrain.trainer.trainer import Trainer

    threads = cpu_threads(config, source)
    kind, arguments, options = _engine(config, source)
    trained = (source, config.model, config.trainer)
    if engine_name(config) == "vllm":  # first, alone: it measures the GPU's free memory
        engine = kind(*arguments, **options)
        trainer = Trainer(*trained, seed=config.seed)
    else:
        trainer = Trainer(*trained, seed=config.seed)
        shared = trainer.base_weights() if config.trainer.method == "lora" else None
        engine = kind(*arguments, **options, base_weights=shared)
    return ThreadCaller(engine, "sampler", threads), ThreadCaller(trainer, "trainer", threads)


async def _actors(config: Config, source: str) -> tuple[Caller, Caller]:
    """Two Ray actors, half a GPU each where there is one; vLLM, which measures free memory, is up before the trainer."""
    import torch

    from posttrain.rl.service.actors import Resources, start
    from posttrain.trainer.trainer import Trainer

    gpu = 0.5 if torch.cuda.is_available() and config.trainer.device != "cpu" else 0.0
    resources = Resources(cpu_threads(config, source), gpu)
    kind, arguments, options = _engine(config, source)
    sampler = start(kind, "sampler", resources, *arguments, **options)
    if engine_name(config) == "vllm":
        await sampler("wake")
    learner = start(Trainer, "trainer", resources, source, config.model, config.trainer, seed=config.seed)
    await asyncio.gather(sampler("wake"), learner("memory"))  # builds both at once
    return sampler, learner


def _engine(config: Config, source: str) -> tuple[type[Any], tuple[Any, ...], dict[str, Any]]:
    """Class, arguments and options of the rollout engine."""
    rollout = config.rollout.model_copy(update={"max_model_len": config.max_model_len})
    arguments = (source, config.model, rollout)
    if engine_name(config) == "vllm":
        from posttrain.rollout.vllm_engine import VllmEngine

        return VllmEngine, arguments, {"lora_rank": config.trainer.lora.rank}
    from posttrain.rollout.transformers_engine import TransformersEngine

    return TransformersEngine, arguments, {"device": config.trainer.device}
