"""A tiny random Qwen3-shaped model whose tokenizer has a chat template."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.rl.service.random_model import character_tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def write_tiny_chat_model(folder: Path) -> Path:
    """Write weights and tokenizer (a token a printable character); returns the folder."""
    tokenizer = character_tokenizer(string.printable)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model("qwen3", vocab_size=len(tokenizer), **special, **SHAPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
