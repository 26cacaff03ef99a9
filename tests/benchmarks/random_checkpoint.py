"""Random weights in the shape of a known model, written as an ordinary checkpoint: speed and memory need no others."""

from __future__ import annotations

import argparse
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from posttrain.rl.service.random_model import character_tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "model_type": "qwen3",
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
    "qwen3-4b": _sizes(2560, 36, 32, 8, 9728),
    "qwen3-0.6b": _sizes(1024, 28, 16, 8, 3072),
    "llama-3.1-8b": _sizes(
        4096, 32, 32, 8, 14336, model_type="llama", vocab_size=128256, tie_word_embeddings=False, rms_norm_eps=1e-5
    ),
    "tiny": _sizes(64, 2, 2, 1, 128, head_dim=32, vocab_size=256, initializer_range=0.15),
}
"""Published sizes, and one for a CPU."""


def write(folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> Path:
    """Write the checkpoint unless it is there: weights drawn on the GPU if there is one, a tokenizer with a token a
    character that fills the whole vocabulary (samplers never draw ids beyond it), and a chat template. ``layers``: in
    place of the shape's own number.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "tokenizer_config.json").exists():
        return folder
    fields = {**SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})}
    tokenizer = character_tokenizer(_characters(fields["vocab_size"] - 2))
    tokenizer.chat_template = TEMPLATE
    assert len(tokenizer) == fields["vocab_size"]
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(**{**special, **fields})
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def default_folder(shape: str) -> Path:
    """In main memory where the machine has such a place."""
    return Path("/dev/shm" if Path("/dev/shm").is_dir() else ".") / f"posttrain-{shape}"


def write_in_child(folder: Path, shape: str, dtype: str = "bfloat16", layers: int | None = None) -> Path:
    """``write`` in a process of its own, which takes its CUDA context with it."""
    command = [sys.executable, __file__, str(folder), shape, "--dtype", dtype]
    subprocess.run([*command, *(["--layers", str(layers)] if layers else [])], check=True)
    return folder


def _characters(count: int) -> str:
    """The printable ones, then others as far as needed, from a plane without surrogates."""
    rest = (chr(0x20000 + index) for index in range(count - len(string.printable)))
    return string.printable + "".join(rest)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    print(write(options.folder, options.shape, getattr(torch, options.dtype), options.layers))
