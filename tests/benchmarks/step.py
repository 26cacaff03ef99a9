"""Where the seconds of one training step go, with sampler and trainer in turns and overlapped."""

from __future__ import annotations

import random
import shutil
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import emit

from posttrain import rl
from posttrain.rl.run_dir import RunDir


@dataclass(slots=True, frozen=True)
class Settings:
    """One run."""

    source: Path
    base: str
    """``bf16``, ``nf4`` or ``fp8``."""
    max_staleness: int
    """0: in turns; 1: overlapped."""
    out: Path
    """Where the picture goes."""
    steps: int = 6
    prompts: int = 8
    samples: int = 8
    max_tokens: int = 512
    engine: str = "vllm"
    kv_cache_gib: float | None = None
    eager: bool = False


@rl.reward
def letters(completion: str) -> float:
    """Share of the low half of the characters: something that differs between samples."""
    return sum(ord(character) % 2 for character in completion) / max(1, len(completion))


def rows(count: int = 256, length: int = 100) -> list[dict[str, str]]:
    """Prompts of random characters."""
    draw = random.Random(0)
    alphabet = string.ascii_letters + string.digits
    return [{"prompt": "".join(draw.choices(alphabet, k=length))} for _ in range(count)]


def run(settings: Settings) -> None:
    """Train a few steps, and report the middle one by phase."""
    from posttrain.rl.plot import write_timeline_plot

    case = f"{settings.base} {'overlapped' if settings.max_staleness else 'on-policy'}"
    rollout: dict[str, Any] = {
        "engine": settings.engine,
        "prompts_per_step": settings.prompts,
        "group_size": settings.samples,
        "max_tokens": settings.max_tokens,
        "max_staleness": settings.max_staleness,
        "enforce_eager": settings.eager,
    }
    if settings.kv_cache_gib is not None:
        rollout["kv_cache_gib"] = settings.kv_cache_gib
    result = rl.train(
        model={"name": str(settings.source), "quantization": "none" if settings.base == "bf16" else settings.base},
        dataset=rows(),
        data={"chat": False, "max_prompt_tokens": 128},
        rewards=[letters],
        algorithm="grpo",
        steps=settings.steps,
        rollout=rollout,
        trainer={"learning_rate": 1e-6, "activation_checkpointing": True, "micro_batch_tokens": 16384},
        checkpoint={"every": 0},
        logging={"console": "plain", "plot": False, "rollouts_every": 0},
        output_dir=tempfile.mkdtemp(prefix="step-"),
    )
    trained = [row for row in result.metrics if "time/step_s" in row]
    chosen = trained[len(trained) // 2]
    keys = [key for key in chosen if key.startswith("time/") or key in _BESIDE]
    emit("step", case, step=chosen["step"], **{key.partition("/")[2]: chosen[key] for key in keys})
    settings.out.mkdir(parents=True, exist_ok=True)
    picture = settings.out / f"step_{case.replace(' ', '_')}.png"
    write_timeline_plot(RunDir.open(result.run_dir), chosen["step"], picture)
    shutil.rmtree(result.run_dir)


_BESIDE = ("perf/tokens_per_second", "perf/samples_per_second", "perf/peak_memory_gib", "policy/kl_sampler")
