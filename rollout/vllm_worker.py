"""What our vLLM workers do beside vLLM's: share the weights, hold one adapter, bound the vocabulary.

Everything named ``posttrain_*`` is called by name through ``collective_rpc``; what vLLM's messages cannot carry goes as
pickled bytes. The class is put before vLLM's own worker in ``vllm_gpu_worker`` and ``vllm_cpu_worker``.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.kernels.launch import runs_triton
from posttrain.rl.sharing import opened
from posttrain.rollout.vllm_export import exported
from posttrain.rollout.vllm_fp8 import use_weight_only
from posttrain.rollout.vllm_layout import Layout
from posttrain.rollout.vllm_lora import attach, overwrite, slot_views, write_zero_adapter
from posttrain.rollout.vllm_nf4 import use_packed_product

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.rl.types import SharedAdapter

_PR_SET_PDEATHSIG = 1
LORA_ID = 1
"""The one adapter that vLLM's own slots hold."""


def _timed(phase: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Note how long a phase of the start took."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(self, *args, **kwargs)
            finally:
                self.__dict__.setdefault("posttrain_seconds", {})[phase] = time.perf_counter() - start

        return timed

    return decorate


class PosttrainWorker:
    """Mixed into a vLLM worker; what it overrides is vLLM's."""

    model_runner: Any
    vllm_config: Any
    device: torch.device

    # -- start --------------------------------------------------------------------------------------------------------

    @_timed("device")
    def init_device(self) -> None:
        """See vLLM's worker."""
        super().init_device()  # type: ignore[misc]

    @_timed("load")
    def load_model(self, **options: Any) -> None:
        """Load, then put our products and the adapter's matrices in: before anything is compiled or captured."""
        super().load_model(**options)  # type: ignore[misc]
        self._private: list[Tensor] = []
        self._opened: tuple[Any, Tensor] | None = None
        self._held: dict[str, Tensor] = {}
        self._layout = Layout.of(self.model_runner.get_model())
        like = torch.empty(0, dtype=self.vllm_config.model_config.dtype, device=self.device)
        if not self.vllm_config.additional_config["posttrain_fp8_activations"]:
            use_weight_only(self.model_runner.get_model(), like)
        if self.vllm_config.additional_config["posttrain_nf4_product"] and runs_triton(self.device):
            use_packed_product(self.model_runner.get_model(), like)
        if spec := self._spec("dense"):
            self._held = attach(self._layout, spec["targets"], spec["rank"], like)

    @_timed("profile and compile")
    def determine_available_memory(self) -> int:
        """See vLLM's worker."""
        return super().determine_available_memory()  # type: ignore[misc]

    @_timed("cache")
    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """See vLLM's worker."""
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]

    @_timed("warm up and capture")
    def compile_or_warm_up_model(self) -> Any:
        """See vLLM's worker."""
        return super().compile_or_warm_up_model()  # type: ignore[misc]

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        """Weights stay out of the sleeping allocator: its memory cannot be shared, and they never sleep."""
        if tag == "weights":
            return nullcontext()
        return super()._maybe_get_memory_pool_context(tag)  # type: ignore[misc]

    def posttrain_start(self, vocab_size: int) -> dict[str, float]:
        """Everything that is done once, when vLLM is up; seconds of each phase of its start."""
        if sys.platform == "linux" and multiprocessing.parent_process() is not None:
            # The kernel ends this process when the one that started it is gone, ``kill -9`` included.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self._bound_vocabulary(vocab_size)
        if spec := self._spec("slots"):
            self._take_slot(spec)
        return dict(self.__dict__.get("posttrain_seconds", {}))

    def _bound_vocabulary(self, vocab_size: int) -> None:
        """Make ids from ``vocab_size`` on impossible, and sample from float32 logits.

        ``compute_logits`` runs outside the compiled graph and the CUDA graphs: both model runners see it wrapped.
        Without the cast the newer one divides by the temperature and truncates in the model's bfloat16.
        """
        model = self.model_runner.model
        compute_logits = model.compute_logits

        def bounded(*args: Any, **kwargs: Any) -> Any:
            logits = compute_logits(*args, **kwargs)
            if logits is None:  # a rank that does not sample
                return None
            logits = logits.float()
            logits[..., vocab_size:] = -float("inf")
            return logits

        model.compute_logits = bounded

    # -- weights ------------------------------------------------------------------------------------------------------

    def posttrain_export_weights(self, shapes: dict[str, list[int]]) -> bytes:
        """``SharedWeights``, pickled, of the transformers parameters named."""
        weights, self._private = exported(self._layout, {name: tuple(shape) for name, shape in shapes.items()})
        return pickle.dumps(weights)

    # -- adapter ------------------------------------------------------------------------------------------------------

    def posttrain_load_adapter(self, payload: bytes) -> str:
        """Hold a pickled ``SharedAdapter`` from now on; the checksum of what is held, read back."""
        adapter: SharedAdapter = pickle.loads(payload)
        handle = adapter.buffer.handle
        if isinstance(handle, torch.Tensor):
            flat = handle
        elif self._opened is not None and self._opened[0] == handle:
            flat = self._opened[1]
        else:
            flat = opened(adapter.buffer)
            self._opened = (handle, flat)
        return overwrite(self._held, flat, adapter.layout)

    def _spec(self, backend: str) -> dict[str, Any] | None:
        """Rank and targets of the adapter, where it is held that way; part of the key of vLLM's compile cache."""
        spec = self.vllm_config.additional_config.get("posttrain_lora")
        return spec if spec and spec["backend"] == backend else None

    def _take_slot(self, spec: dict[str, Any]) -> None:
        """Have vLLM register an adapter that changes nothing, for good; every real one is written over it.

        Pinned: evicted and put back from host memory it would be the zeros again.
        """
        from vllm.lora.request import LoRARequest

        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(prefix="posttrain-", dir=memory if memory.is_dir() else None) as folder:
            write_zero_adapter(Path(folder), spec["targets"], spec["rank"], self.vllm_config.model_config.dtype)
            self.add_lora(LoRARequest("posttrain", LORA_ID, folder))  # type: ignore[attr-defined]
        self.pin_lora(LORA_ID)  # type: ignore[attr-defined]
        manager = self.model_runner.lora_manager._adapter_manager
        self._held = slot_views(self._layout, manager, LORA_ID, spec["targets"], spec["rank"])
