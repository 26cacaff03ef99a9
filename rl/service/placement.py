"""Where the sampler and the trainer live: both in this process around one copy of the base, or in two Ray actors."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
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


def check_installed(config: Config) -> None:
    """Before anything loads: raise ``EngineError`` where the engine or the optimizer cannot run on this machine."""
    engine_name(config)
    if config.trainer.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise EngineError(
            'trainer.optimizer = "adamw_8bit" needs bitsandbytes: pip install "posttrain[bnb]", or use "adamw"'
        )


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
    name = engine_name(config)
    async with AsyncExitStack() as stack:
        if config.placement == "ray" or (config.placement == "auto" and name == "vllm"):
            sampler, learner = await _actors(config, source, stack)
        else:
            sampler, learner = await _embedded(config, source, stack)
        yield SamplerHandle(sampler), LearnerHandle(learner)


async def _embedded(config: Config, source: str, stack: AsyncExitStack) -> tuple[Caller, Caller]:
    """Both in this process; a LoRA run on the transformers engine holds the base weights once."""
    from posttrain.rl.service.local import ThreadCaller
    from posttrain.trainer.trainer import Trainer

    threads = cpu_threads(config, source)
    make_engine = _engine(config, source)
    make_trainer = partial(Trainer, source, config.model, config.trainer, seed=config.seed)
    if engine_name(config) == "vllm":  # first, alone: it measures the GPU's free memory
        sampler = await _closing(stack, ThreadCaller.build("sampler", threads, make_engine))
        return sampler, await _closing(stack, ThreadCaller.build("trainer", threads, make_trainer))
    learner = await _closing(stack, ThreadCaller.build("trainer", threads, make_trainer))
    shared = await learner("base_weights") if config.trainer.method == "lora" else None
    make_engine = partial(make_engine, base_weights=shared)
    return await _closing(stack, ThreadCaller.build("sampler", threads, make_engine)), learner


async def _actors(config: Config, source: str, stack: AsyncExitStack) -> tuple[Caller, Caller]:
    """Two Ray actors, half a GPU each where there is one; the engine is up before the trainer starts."""
    import torch

    from posttrain.rl.service.actors import ActorCaller, Resources, ray_session
    from posttrain.trainer.trainer import Trainer

    stack.enter_context(ray_session())
    gpu = 0.5 if torch.cuda.is_available() and config.trainer.device != "cpu" else 0.0
    resources = Resources(cpu_threads(config, source), gpu)
    sampler = await _closing(stack, ActorCaller.build("sampler", resources, _engine(config, source)))
    make_trainer = partial(Trainer, source, config.model, config.trainer, seed=config.seed)
    return sampler, await _closing(stack, ActorCaller.build("trainer", resources, make_trainer))


async def _closing(stack: AsyncExitStack, building: Awaitable[Caller]) -> Caller:
    """Wait for a caller, and close it when the stack unwinds."""
    caller = await building
    stack.push_async_callback(caller.close)
    return caller


def _engine(config: Config, source: str) -> partial[Any]:
    """What makes the rollout engine."""
    rollout = config.rollout.model_copy(update={"max_model_len": config.max_model_len})
    if engine_name(config) == "vllm":
        from posttrain.rollout.vllm_engine import VllmEngine

        return partial(VllmEngine, source, config.model, rollout, lora_rank=config.trainer.lora.rank)
    from posttrain.rollout.transformers_engine import TransformersEngine

    return partial(TransformersEngine, source, config.model, rollout, device=config.trainer.device)
