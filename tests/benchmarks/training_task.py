"""What every contender of ``training_step`` trains on, and how it is timed."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE = 1e-5
WARM_UP, STEPS = 2, 5
GIB = 2**30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class Task:
    """Sequences of one length with random tokens; the loss is GRPO's, on policy, over the completions."""

    sequences: int
    prompt: int
    completion: int
    group: int = 1
    """Completions of the same prompt."""

    @property
    def tokens(self) -> int:
        """As stored without sharing prompts."""
        return self.sequences * (self.prompt + self.completion)

    def ids(self, vocabulary: int) -> Tensor:
        """int64 [B, L]."""
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, vocabulary, (self.sequences // self.group, self.prompt), generator=generator)
        completions = torch.randint(3, vocabulary, (self.sequences, self.completion), generator=generator)
        return torch.cat([prompts.repeat_interleave(self.group, dim=0), completions], dim=1)

    def advantages(self) -> Tensor:
        """float32 [B], of both signs."""
        return torch.randn(self.sequences, generator=torch.Generator().manual_seed(1))


def draw_adapter(weights: Mapping[str, nn.Parameter]) -> None:
    """The same numbers for everyone, B too: beside a B of zeros, A has no gradient."""
    with torch.no_grad():
        for name, weight in weights.items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = weight.shape[1] ** -0.5 if ".lora_A." in name else 0.02
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)


def adapter_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """A peft model's trained weights under one name whoever made it."""
    found = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert found and all(".lora_" in name for name in found), sorted(found)[:3]
    return {canonical(name): weight for name, weight in found.items()}


def canonical(name: str) -> str:
    """``model.layers.0.self_attn.q_proj.lora_A.weight``."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def gradients(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """float32, on the host."""
    missing = [name for name, weight in weights.items() if weight.grad is None]
    assert not missing, f"no gradient: {missing[:3]}"
    return {name: weight.grad.float().cpu() for name, weight in weights.items() if weight.grad is not None}


def relative_error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Of all gradients end to end."""
    assert found.keys() == exact.keys(), sorted(found.keys() ^ exact.keys())[:4]
    names = sorted(exact)
    one, two = (torch.cat([side[name].flatten() for name in names]) for side in (found, exact))
    return ((one - two).norm() / two.norm()).item()


def timed(step: Callable[[], None], tokens: int, steps: int = STEPS) -> dict[str, Any]:
    """Median seconds of a step, tokens a second, and the peak of the GPU's memory while at it."""
    on_gpu = DEVICE.type == "cuda"
    weights = torch.cuda.memory_allocated() if on_gpu else 0
    for _ in range(WARM_UP):
        step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    return {
        "tokens_per_s": tokens / median,
        "step_s": median,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else 0.0,
        "weights_gib": weights / GIB,
    }
