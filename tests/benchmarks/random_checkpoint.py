"""Random weights in the shape of a known model, written as an ordinary checkpoint: speed and memory need no others."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from posttrain.rl.service.random_model import character_tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def _qwen3(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    return {**fields, **changes}


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072),
    "tiny": _qwen3(64, 2, 2, 1, 128, head_dim=32, vocab_size=128, initializer_range=0.2),
}
"""Qwen3's published sizes, and one for a CPU."""


def write(folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the checkpoint unless it is there: weights drawn on the GPU if there is one, a token a printable character
    and a chat template. Ids beyond the tokenizer stand for padding of the vocabulary: they are never sampled.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "tokenizer_config.json").exists():
        return folder
    tokenizer = character_tokenizer(string.printable)
    tokenizer.chat_template = TEMPLATE
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model("qwen3", **{**special, **SHAPES[shape]})
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
