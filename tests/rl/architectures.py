"""Model shapes and machines that the memory tests count with."""

from __future__ import annotations

from typing import Any

from posttrain.rl.config import Config, build
from posttrain.rl.machine import GIB, Memory

SMALL = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "vocab_size": 64,
}
QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
H200 = Memory("cuda", "NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0), 0)
GPU = Memory("cuda", "a GPU", 80 * GIB, 79 * GIB, (9, 0))
CPU = Memory("cpu", "main memory", 64 * GIB, 60 * GIB)


def configured(architecture: dict[str, Any], **changes: Any) -> Config:
    return build({"model": {"random": {"config": architecture}}, **changes})
