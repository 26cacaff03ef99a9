"""Settings of real runs that take well under a second: a model of one layer, three steps."""

from __future__ import annotations

from typing import Any

MODEL = {
    "random": {
        "characters": "0123456789>",
        "config": {
            "model_type": "qwen3",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 32,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        },
    }
}
ROWS = [{"prompt": f"{digit}>", "answer": str((digit + 1) % 10)} for digit in range(10)]


def settings(**changes: Any) -> dict[str, Any]:
    """Keyword arguments of ``rl.train`` beside dataset, rewards and output folder."""
    small = {
        "model": MODEL,
        "steps": 3,
        "prompts_per_step": 2,
        "group_size": 4,
        "max_tokens": 3,
        "learning_rate": 1e-2,
        "lora": {"rank": 4},
        "logging": {"console": "off", "plot": False},
    }
    return {**small, **changes}


def spread(completion: str) -> float:
    """Tells almost any two completions apart."""
    return sum((ord(character) - 45) / 3**place for place, character in enumerate(completion, 1))


def reproducible(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))} for row in rows]
