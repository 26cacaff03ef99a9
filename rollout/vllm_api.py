"""The parts of vLLM that the engine uses, and its errors. Imported when an engine is built, never before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import torch

from posttrain.rl.errors import EngineError, OutOfMemory
from posttrain.rl.machine import dtype_name

if TYPE_CHECKING:
    from posttrain.rl.config import ModelConfig


class Vllm:
    """The parts of vLLM that are used here, imported now."""

    def __init__(self) -> None:
        try:
            from vllm import EngineArgs, SamplingParams
            from vllm.inputs import tokens_input
            from vllm.platforms import current_platform
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.llm_engine import LLMEngine
            from vllm.v1.executor import Executor
        except ImportError as error:
            raise EngineError(
                f"rollout.engine = 'vllm' cannot import vLLM ({error}): pip install 'posttrain[vllm]'"
            ) from None
        self.SamplingParams, self.tokens_input = SamplingParams, tokens_input
        self.FINAL_ONLY = RequestOutputKind.FINAL_ONLY
        self.on_gpu = not current_platform.is_cpu()
        self._platform, self._args, self._engine, self._executor = current_platform, EngineArgs, LLMEngine, Executor

    def dtype(self, model: ModelConfig) -> torch.dtype:
        """Type of weights and activations. It is vLLM that asks the driver: torch would open a CUDA context."""
        capability = self._platform.get_device_capability() if self.on_gpu else None
        dtype = getattr(torch, dtype_name(model.dtype, tuple(capability) if capability else None))
        if dtype == torch.float64:
            raise EngineError('vLLM has no float64: use model.dtype = "float32" or rollout.engine = "transformers"')
        return dtype

    def engine(self, args: Mapping[str, Any], *, multiprocess: bool) -> Any:
        """A started ``LLMEngine``."""
        config = self._args(**args).create_engine_config()
        return self._engine(config, self._executor.get_class(config), log_stats=False, multiprocess_mode=multiprocess)

    @staticmethod
    def slot_ranks() -> tuple[int, ...]:
        """The ranks vLLM's own slots come in."""
        from vllm.config.lora import MaxLoRARanks

        return get_args(MaxLoRARanks)

    @staticmethod
    def slot_request() -> Any:
        """Names the adapter that the worker registers at its start; it is never loaded from that path."""
        from vllm.lora.request import LoRARequest

        from posttrain.rollout.vllm_worker import LORA_ID

        return LoRARequest("posttrain", LORA_ID, "/posttrain-adapter-is-in-its-slot")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn every form in which vLLM says that the GPU's memory ran out into ``OutOfMemory``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            raise OutOfMemory(f"vLLM ran out of GPU memory: {error}") from error
        raise
