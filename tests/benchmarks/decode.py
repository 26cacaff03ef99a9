"""Generated tokens a second: no adapter, our dense path, vLLM's own slots; in this process and beside it."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pair import prompts_of
from report import emit

from posttrain.rl.config import ModelConfig, RolloutConfig
from posttrain.rl.types import Adapter, SamplingParams
from posttrain.rollout.vllm_engine import VllmEngine

RANK = 16


@dataclass(slots=True, frozen=True)
class Settings:
    """One engine."""

    source: Path
    base: str
    """``bf16``, ``nf4`` or ``fp8``."""
    lora: str
    """``none``, ``dense`` or ``slots``."""
    in_process: bool
    kv_cache_bytes: int
    eager: bool
    sequences: tuple[int, ...] = (8, 64, 256)
    prompt_tokens: int = 128
    new_tokens: int = 256


def run(settings: Settings) -> None:
    """Start the engine, check that a non-zero adapter changes what it writes, then time every batch size."""
    case = f"{settings.base} {settings.lora} {'in process' if settings.in_process else 'subprocess'}"
    quantization: Any = "none" if settings.base == "bf16" else settings.base
    backend: Any = settings.lora if settings.lora != "none" else "auto"
    dtype: Any = "bfloat16" if torch.cuda.is_available() else "float32"
    longest = settings.prompt_tokens + settings.new_tokens
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("posttrain").setLevel(logging.INFO)
    began = time.perf_counter()
    engine = VllmEngine(
        settings.source,
        ModelConfig(name=str(settings.source), dtype=dtype, quantization=quantization),
        RolloutConfig(max_model_len=longest, enforce_eager=settings.eager, lora_backend=backend),
        lora_rank=None if settings.lora == "none" else RANK,
        kv_cache_bytes=settings.kv_cache_bytes,
        sequences=max(settings.sequences),
        in_process=settings.in_process,
    )
    figures: dict[str, Any] = {"start_s": time.perf_counter() - began}
    try:
        if settings.lora != "none":
            figures["adapter_changes_output"] = _adapter_works(engine, settings)
        prompts = prompts_of(max(settings.sequences), settings.prompt_tokens)
        engine.generate(prompts[:8], 1, SamplingParams(max_tokens=8))
        for count in settings.sequences:
            params = SamplingParams(max_tokens=settings.new_tokens, seed=count)
            began = time.perf_counter()
            groups = engine.generate(prompts[:count], 1, params)
            seconds = time.perf_counter() - began
            tokens = sum(len(completion.completion_ids) for group in groups for completion in group)
            figures[f"tokens_per_s_{count}"] = tokens / seconds
        emit("decode", case, **figures)
    finally:
        engine.close()


def _adapter_works(engine: VllmEngine, settings: Settings) -> bool:
    """Whether greedy output differs between an adapter of zeros and a random one: a graph compiled without LoRA and
    served from a cache would be fast and wrong.
    """
    prompts, greedy = prompts_of(4, settings.prompt_tokens), SamplingParams(max_tokens=16, temperature=0.0)
    outputs = []
    for version, scale in ((1, 0.0), (2, 0.05)):
        engine.load_adapter(random_adapter(settings.source, version, scale))
        outputs.append([group[0].completion_ids for group in engine.generate(prompts, 1, greedy)])
    return outputs[0] != outputs[1]


def random_adapter(source: Path, version: int, scale: float) -> Adapter:
    """Rank-16 LoRA beside every linear layer but the head, in host memory, under PEFT's names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    generator = torch.Generator().manual_seed(version)
    tensors, targets = {}, set()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            rows, columns = layer.weight.shape
            prefix = f"base_model.model.{name}.lora_"
            tensors[f"{prefix}A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            tensors[f"{prefix}B.weight"] = torch.randn(rows, RANK, generator=generator) * scale
            targets.add(name.rpartition(".")[2])
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": sorted(targets), "bias": "none"}
    return Adapter(version, "lora", tensors, config)
