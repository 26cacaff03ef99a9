"""Our worker on an NVIDIA GPU; vLLM finds it by name."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.warmup import kernel_warmup
from vllm.v1.worker.gpu_worker import Worker

from posttrain.rollout.vllm_worker import PosttrainWorker


class GpuWorker(PosttrainWorker, Worker):
    """vLLM's GPU worker with ours before it."""

    def compile_or_warm_up_model(self) -> Any:
        """Leave out the router kernels of large mixtures of experts, which vLLM compiles for every model on Hopper."""
        name = "_warmup_ll_bf16_router_gemm"
        warm_up = getattr(kernel_warmup, name, None)
        if warm_up is None or self.model_config.is_moe:
            return super().compile_or_warm_up_model()
        setattr(kernel_warmup, name, lambda: None)
        try:
            return super().compile_or_warm_up_model()
        finally:
            setattr(kernel_warmup, name, warm_up)

    def sleep(self, level: int = 1) -> None:
        """Give the KV cache back. vLLM's own also asserts that the GPU has more free memory afterwards, which is not so
        where another process takes some in the same moment: here the trainer does.
        """
        torch.cuda.synchronize()
        self._get_sleep_mode_backend().suspend(level)
        torch.cuda.synchronize()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """All or nothing: where memory runs out half-way, what was mapped is given back, and waking can be tried again.

        vLLM's allocator would map the first half twice.
        """
        from vllm.device_allocator.cumem import CuMemAllocator, unmap_and_release

        allocator = CuMemAllocator.get_instance()
        asleep = [data for data in allocator.pointer_to_data.values() if data.is_asleep]
        try:
            super().wake_up(tags)
        except BaseException:
            for data in asleep:
                if not data.is_asleep:
                    unmap_and_release(data.handle)
                    data.is_asleep = True
            raise
