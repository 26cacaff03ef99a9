"""What vLLM is started with, worked out from the configuration; nothing here imports vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from posttrain.rl.errors import EngineError
from posttrain.rl.footprint import BATCHED_TOKENS, capture_sizes

if TYPE_CHECKING:
    from torch import nn

    from posttrain.rl.config import ModelConfig, RolloutConfig

_QUANTIZATION = {"none": None, "nf4": "bitsandbytes", "fp8": "fp8"}
_MOST_SEQUENCES = 1024


@dataclass(slots=True, frozen=True)
class Architecture:
    """The transformers model behind a checkpoint, looked at without storage."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of every parameter; a tied head is left out."""
    linear: Mapping[str, tuple[int, int]]
    """Outputs and inputs of every linear layer but the head."""
    longest: int | None
    """``max_position_embeddings``."""

    @classmethod
    def of(cls, source: str, model: ModelConfig) -> Architecture:
        """Build the model on the meta device."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(source, revision=model.revision, trust_remote_code=model.trust_remote_code)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        network.tie_weights()
        head = network.get_output_embeddings()
        return cls(
            {name: tuple(parameter.shape) for name, parameter in network.named_parameters()},
            {name: _sides(layer) for name, layer in network.named_modules() if _is_linear(layer) and layer is not head},
            getattr(config.get_text_config(), "max_position_embeddings", None),
        )

    def targets(self, wanted: str | Sequence[str]) -> dict[str, tuple[int, int]]:
        """The layers that ``trainer.lora.target_modules`` names."""
        if wanted == "all-linear":
            return dict(self.linear)
        endings = [wanted] if isinstance(wanted, str) else list(wanted)
        found = {
            name: sides
            for name, sides in self.linear.items()
            if any(name == ending or name.endswith(f".{ending}") for ending in endings)
        }
        if not found:
            raise EngineError(f"no linear layer of the model ends in {', '.join(endings)}: check target_modules")
        return found


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear)


def _sides(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


@dataclass(slots=True, frozen=True)
class Start:
    """Everything that decides how vLLM is started."""

    source: str
    model: ModelConfig
    rollout: RolloutConfig
    dtype: torch.dtype
    on_gpu: bool
    architecture: Architecture
    lora_rank: int | None = None
    lora_targets: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kv_cache_bytes: int | None = None
    sequences: int | None = None

    @property
    def lora_backend(self) -> str:
        """``dense`` or ``slots``."""
        return "dense" if self.rollout.lora_backend == "auto" else self.rollout.lora_backend

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``vllm.EngineArgs``."""
        rollout = self.rollout
        args: dict[str, Any] = {
            "model": self.source,
            "revision": self.model.revision,
            "trust_remote_code": self.model.trust_remote_code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": self._quantization(),
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",
            "enforce_eager": rollout.enforce_eager,
            "disable_log_stats": True,
            "distributed_executor_backend": "uni",
            "worker_cls": f"posttrain.rollout.vllm_{'gpu_worker.Gpu' if self.on_gpu else 'cpu_worker.Cpu'}Worker",
            # Hashed into the key of vLLM's compile cache, which does not see that a layer's method was changed.
            "additional_config": {
                "posttrain_fp8_activations": rollout.fp8_activations,
                "posttrain_nf4_product": True,  # False: bitsandbytes' instead of ours, to compare them
            },
        }
        if self.dtype != torch.float32:
            # As the trainer's are: a logit of 30 rounded to bfloat16 is off by up to 1/16 of a nat.
            args["hf_overrides"] = {"head_dtype": "float32"}
        if rollout.max_model_len is not None:
            longest = self.architecture.longest
            args["max_model_len"] = min(rollout.max_model_len, longest or rollout.max_model_len)
        if self.sequences is not None:
            args["max_num_seqs"] = min(self.sequences, _MOST_SEQUENCES)
            if self.on_gpu:
                args["compilation_config"] = {"cudagraph_capture_sizes": capture_sizes(args["max_num_seqs"])}
        if self.on_gpu:
            most = args.get("max_num_seqs", _MOST_SEQUENCES) * args.get("max_model_len", BATCHED_TOKENS)
            args |= {"enable_sleep_mode": True, "max_num_batched_tokens": min(BATCHED_TOKENS, most)}
        if self.kv_cache_bytes is not None:
            # Next to a stated number of bytes vLLM uses its share of the GPU for one check only: at the start as much
            # must be free. What is really needed was checked before (`rl.memory.split`).
            args |= {"kv_cache_memory_bytes": self.kv_cache_bytes}
            if self.on_gpu:
                args["gpu_memory_utilization"] = 0.01
        self._add_lora(args)
        return args

    def _quantization(self) -> str | None:
        quantization = self.model.quantization
        if quantization != "none" and self.dtype == torch.float32:
            raise EngineError(
                f'model.quantization = "{quantization}" needs 16-bit activations in vLLM: use model.dtype = "bfloat16"'
            )
        return _QUANTIZATION[quantization]

    def _add_lora(self, args: dict[str, Any]) -> None:
        if self.lora_rank is None:
            return
        spec = {"backend": self.lora_backend, "rank": self.lora_rank, "targets": dict(self.lora_targets)}
        args["additional_config"]["posttrain_lora"] = spec
        if self.lora_backend == "slots":
            # Left to itself vLLM gives the head a slot too: vocabulary times rank for nothing, and 0.26 cannot start
            # with it where the vocabulary is no multiple of 64.
            endings = sorted({name.rpartition(".")[2] for name in self.lora_targets})
            args |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "lora_target_modules": endings}


def allowed_rank(rank: int, allowed: Sequence[int]) -> int:
    """Smallest rank of vLLM's slots that holds ``rank``."""
    fitting = [size for size in sorted(allowed) if size >= rank]
    if not fitting:
        raise EngineError(
            f"trainer.lora.rank = {rank} is above the largest of vLLM's slots, {max(allowed)}: "
            'use rollout.lora_backend = "dense"'
        )
    return fitting[0]
