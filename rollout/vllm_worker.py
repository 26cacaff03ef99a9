"""What runs inside vLLM's worker process: mixed into its worker by ``worker_extension_cls``, called by name through
``collective_rpc``. Nothing here imports the rest of vLLM at module level, so that the class resolves before it starts.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from typing import Any

from posttrain.rl.fingerprint import fingerprint

_PR_SET_PDEATHSIG = 1


class WorkerExtension:
    """Methods added to every vLLM worker; ``self`` is the worker."""

    model_runner: Any

    def posttrain_die_with_parent(self) -> None:
        """Let the kernel end this process when the one that started it is gone, ``kill -9`` included (Linux only)."""
        if sys.platform == "linux" and multiprocessing.parent_process() is not None:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def posttrain_bound_vocabulary(self, vocab_size: int) -> None:
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

    def posttrain_lora_modules(self) -> list[str]:
        """Names of every module an adapter may hold tensors for, packed ones by their parts (``q_proj``, …)."""
        manager = self.model_runner.lora_manager._adapter_manager
        return [part for name in manager.modules for part in manager.packed_modules.get(name, [name])]

    def posttrain_lora_fingerprints(self, lora_id: int, rank: int, names: list[str]) -> dict[str, str]:
        """Fingerprint of each named tensor as it lies in the active slot; a name that is not held is left out."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        manager = self.model_runner.lora_manager._adapter_manager
        if lora_id not in manager.lora_index_to_id:
            return {}
        slot = manager.lora_index_to_id.index(lora_id)
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        # The mapper vLLM's own loader takes: renames, but q, k, v not fused. vLLM 0.26 has the first, 0.32 the second.
        for method in ("get_unstacked_mapper", "get_rename_mapper"):
            mapper = getattr(mapper, method, lambda mapper=mapper: mapper)()
        places = {}
        for name, module in manager.modules.items():
            parts = manager.packed_modules.get(name, [name])
            stacked = getattr(module, "lora_a_stacked", None)
            if isinstance(stacked, tuple) and len(parts) == len(stacked):
                places.update({part: (module, index) for index, part in enumerate(parts)})
        found = {}
        for name in names:
            module_name, is_a = parse_fine_tuned_lora_name(name, mapper)
            if module_name in places:
                module, index = places[module_name]
                held = (module.lora_a_stacked if is_a else module.lora_b_stacked)[index][slot, 0]
                found[name] = fingerprint({name: held[:rank] if is_a else held[:, :rank]})
        return found
