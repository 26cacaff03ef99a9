"""The byte model of activations beside what a forward and backward pass takes, and what offloading them costs.

    python tests/benchmarks/memory_model.py                        # Qwen3-4B's shape, under a minute
    python tests/benchmarks/memory_model.py --kernels reference --tokens 2048 4096
    python tests/benchmarks/memory_model.py --shape tiny           # on a CPU: seconds only

Packed sequences of 1,024 tokens, three quarters of them in the loss, LoRA of rank 16 on every projection. Measured is
the peak of what torch allocates above what the trainer holds anyway, gradients among it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import SHAPES, default_folder, write
from training_ours import batch_of
from training_task import DEVICE, RANK, Task

from posttrain.rl.algorithms import parse as parse_algorithm
from posttrain.rl.config import ModelConfig, TrainerConfig, build
from posttrain.rl.errors import OutOfMemory
from posttrain.rl.footprint import estimate_memory
from posttrain.rl.machine import GIB, Memory
from posttrain.trainer.trainer import Trainer

PROMPT, COMPLETION = 256, 768
SCHEMES: dict[str, dict[str, bool]] = {
    "plain": {},
    "checkpointing": {"activation_checkpointing": True},
    "offload": {"activation_checkpointing": True, "offload_activations": True},
}


def modelled(shape: str, tokens: int, trainer: dict[str, Any]) -> tuple[float, float]:
    """GiB on the device and in pinned host memory."""
    config = build(
        {
            "model": {"random": {"config": {"model_type": "qwen3", **SHAPES[shape]}}},
            "data": {"max_prompt_tokens": PROMPT},
            "rollout": {"engine": "transformers", "prompts_per_step": 64, "max_tokens": COMPLETION},
            "trainer": {**trainer, "micro_batch_tokens": tokens, "lora": {"rank": RANK}},
        }
    )
    memory = Memory("cuda", "GPU", 2**40, 2**40) if DEVICE.type == "cuda" else None
    found = estimate_memory(config, memory)
    return found.activations / GIB, found.pinned / GIB


def measured(trainer: Trainer, tokens: int) -> tuple[float, float]:
    """Peak GiB above what was there before, and seconds, of the second of two passes."""
    task = Task(max(1, tokens // (PROMPT + COMPLETION)), PROMPT, COMPLETION)
    batch = batch_of(task, trainer._causal_lm.config.get_text_config().vocab_size)
    algorithm = parse_algorithm("grpo")
    trainer.forward_backward([batch], algorithm)
    on_gpu = DEVICE.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trainer.forward_backward([batch], algorithm)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return (torch.cuda.max_memory_allocated() - before) / GIB if on_gpu else 0.0, seconds


def schemes(trainer: Trainer, names: list[str]) -> Iterator[str]:
    """The trainer in each scheme in turn: weights are loaded once."""
    layers = trainer._causal_lm.get_decoder().layers
    for name in names:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        if name != "plain":
            trainer._model.enable_checkpointing(offload=name == "offload")
        yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-4b", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help="of a micro-batch")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--kernels", default="auto", choices=["auto", "triton", "reference"])
    parser.add_argument("--model", type=Path, help="folder of the checkpoint; written there if it is not there yet")
    options = parser.parse_args()
    folder = write(options.model or default_folder(options.shape), options.shape)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    plain = {"kernels": options.kernels, "share_prompts": False}
    settings = TrainerConfig(lora={"rank": RANK}, activation_checkpointing=False, **plain)
    trainer = Trainer(folder, ModelConfig(name=str(folder)), settings)
    print("| scheme | tokens | measured GiB | modelled GiB | measured / modelled | pinned GiB | tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for name in schemes(trainer, options.schemes):
        for tokens in options.tokens:
            device, pinned = modelled(options.shape, tokens, {**plain, **SCHEMES[name]})
            try:
                peak, seconds = measured(trainer, tokens)
                figures = f"{peak:.2f} | {device:.2f} | {peak / device:.2f} | {pinned:.2f} | {tokens / seconds:,.0f}"
            except OutOfMemory as error:
                figures = f"{str(error)[:60]} | {device:.2f} | – | {pinned:.2f} | –"
            print(f"| {name} | {tokens} | {figures} |", flush=True)
    trainer.close()


if __name__ == "__main__":
    main()
