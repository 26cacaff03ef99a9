"""One training step of our trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_task import (
    ALPHA,
    DEVICE,
    LEARNING_RATE,
    RANK,
    TARGETS,
    Task,
    canonical,
    draw_adapter,
    gradients,
)

from posttrain.rl.algorithms import parse
from posttrain.rl.config import LoraConfig, ModelConfig, TrainerConfig
from posttrain.rl.types import OptimParams, TrainBatch
from posttrain.trainer.trainer import Trainer


class Ours:
    """The trainer on one micro-batch of the task."""

    def __init__(self, source: Path, task: Task, base: str, settings: dict[str, Any]) -> None:
        quantization: Any = "none" if base == "bf16" else base
        dtype: Any = "bfloat16" if DEVICE.type == "cuda" else "float32"
        lora = LoraConfig(rank=RANK, alpha=ALPHA, target_modules=TARGETS)
        config = TrainerConfig(lora=lora, **{"share_prompts": False, **settings})
        self.trainer = Trainer(source, ModelConfig(name=str(source), dtype=dtype, quantization=quantization), config)
        vocabulary = self.trainer._causal_lm.config.get_text_config().vocab_size
        self.batch = batch_of(task, vocabulary)
        self.algorithm = parse("grpo")

    def step(self) -> None:
        """Forward, backward, clipping, AdamW."""
        self.trainer.forward_backward([self.batch], self.algorithm)
        self.trainer.optim_step(OptimParams(learning_rate=LEARNING_RATE))

    def gradient(self) -> dict[str, Tensor]:
        """Of one step from the adapter that everyone has."""
        weights = {canonical(name): weight for name, weight in self.trainer._weights.items()}
        draw_adapter(weights)
        self.trainer.forward_backward([self.batch], self.algorithm)
        return gradients(weights)


def batch_of(task: Task, vocabulary: int) -> TrainBatch:
    """The task's sequences end to end."""
    ids, length = task.ids(vocabulary), task.prompt + task.completion
    mask = (torch.arange(length) >= task.prompt).repeat(task.sequences)
    return TrainBatch(
        input_ids=ids.flatten(),
        position_ids=torch.arange(length).repeat(task.sequences),
        cu_seqlens=torch.arange(0, len(mask) + 1, length, dtype=torch.int32),
        loss_mask=mask,
        advantages=mask * task.advantages().repeat_interleave(length),
        num_loss_tokens=int(mask.sum()),
        num_sequences=task.sequences,
        num_micro_batches=1,
        max_tokens=task.completion,
    )
