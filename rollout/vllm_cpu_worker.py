"""Our worker on vLLM's CPU build; vLLM finds it by name."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from posttrain.rollout.vllm_worker import PosttrainWorker


class CpuWorker(PosttrainWorker, CPUWorker):
    """vLLM's CPU worker with ours before it."""
