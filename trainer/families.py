"""What the families of transformers' classes that kernels can stand in for have in common, and where they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """How one family of transformers' classes differs from Llama's."""

    prefix: str
    """Of its class names."""
    parts: tuple[str, ...] = ("RMSNorm", "MLP", "Attention", "DecoderLayer")
    """The rest of the names of the classes that can be replaced."""
    eps: str = "variance_epsilon"
    norm_offset: float = 0.0
    """Added to the norms' weights."""
    activation: str = "hidden_act"
    """The configuration's field."""
    inner: tuple[str, ...] = ("gate_proj", "up_proj")
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    head_norms: bool = False
    """q and k of each head are normed before they are rotated."""
    window: Literal["", "self", "config"] = "self"
    """Who holds the ``sliding_window`` that attention is told; empty: it is not told any."""
    sandwich: bool = False
    """What attention and MLP return is normed before it joins the residual stream."""


_BLOCKS = ("RMSNorm", "MLP")
FAMILIES = {
    "llama": Family("Llama", window=""),
    "mistral": Family("Mistral", window="config"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", head_norms=True),
    "gemma3": Family(
        "Gemma3", eps="eps", norm_offset=1.0, activation="hidden_activation", head_norms=True, sandwich=True
    ),
    "phi3": Family("Phi3", inner=("gate_up_proj",), qkv=("qkv_proj",), window="config"),
    # Attention and layer are their own: positions left out, multipliers, soft-caps.
    "smollm3": Family("SmolLM3", _BLOCKS),
    "granite": Family("Granite", _BLOCKS),
    "gpt_oss": Family("GptOss", ("RMSNorm",)),
    "gemma2": Family("Gemma2", _BLOCKS, eps="eps", norm_offset=1.0, activation="hidden_activation"),
}
"""By the name of transformers' folder."""
