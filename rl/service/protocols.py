"""What the loop asks of the two engines: awaitables, so that an actor, a thread or a fake can stand behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from posttrain.rl.algorithms.base import Algorithm
from posttrain.rl.metrics import Metric
from posttrain.rl.types import (
    Adapter,
    Completion,
    OptimParams,
    OptimResult,
    Prompt,
    Publication,
    SamplingParams,
    Scores,
    TrainBatch,
)


class Sampler(Protocol):
    """Draws completions with the newest adapter it was given."""

    @property
    def members(self) -> Sequence[Sampler]:
        """One sampler a GPU; itself where there is only one."""
        ...

    async def sample(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
        """``n`` completions of each prompt, in the prompts' order."""
        ...

    def stream(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams
    ) -> AsyncIterator[tuple[int, list[Completion]]]:
        """The same completions as ``sample``, each prompt's as soon as all of them are there: index, completions."""
        ...

    async def load_adapter(self, adapter: Publication) -> str:
        """Sample from ``adapter`` from now on; returns the fingerprint of the weights now in the engine."""
        ...

    async def sleep(self) -> None:
        """Give memory back while the trainer works."""
        ...

    async def wake(self) -> None:
        """Undo ``sleep``."""
        ...

    async def close(self) -> None:
        """Release everything; safe to call twice."""
        ...


class Learner(Protocol):
    """Owns the trained weights and their optimizer."""

    @property
    def members(self) -> Sequence[Learner]:
        """One learner a GPU, all with the same weights; itself where there is only one."""
        ...

    async def score(self, batches: Sequence[TrainBatch], *, reference: bool = False) -> list[Scores]:
        """Logprobs and entropies of each micro-batch without gradients; ``reference`` switches the adapter off."""
        ...

    async def forward_backward(self, batches: Sequence[TrainBatch], algorithm: Algorithm) -> dict[str, Metric]:
        """Add the gradients of every micro-batch to what is there; never clears them.

        Raises ``OutOfMemory`` where a micro-batch does not fit; the gradients are then of no use: clear them.
        """
        ...

    async def clear_gradients(self) -> None:
        """Forget the gradients since the last optimizer step."""
        ...

    async def optim_step(self, params: OptimParams) -> OptimResult:
        """Clip, step, clear the gradients; the policy version grows by one."""
        ...

    async def reset_optimizer(self) -> None:
        """Forget the optimizer's moments (after a supervised warm start)."""
        ...

    async def export_adapter(self) -> Adapter:
        """A copy of the trained weights at this version."""
        ...

    async def publish_adapter(self) -> Publication:
        """The trained weights for the sampler on the same GPU: in its memory where that is possible, else a copy."""
        ...

    async def checksum(self) -> str:
        """Checksum of the frozen base weights; must never change. Empty for full fine-tuning."""
        ...

    async def save(self, folder: Path) -> None:
        """Write weights, optimizer, version and random state into an existing folder."""
        ...

    async def load(self, folder: Path) -> None:
        """Undo everything since the matching ``save``."""
        ...

    async def release_memory(self) -> None:
        """Give memory that is only kept in reserve back to the GPU, for the sampler to wake into."""
        ...

    async def memory(self) -> Mapping[str, float]:
        """Peak memory since the last call, ``{"peak_memory_gib": …}``."""
        ...

    async def close(self) -> None:
        """Release everything; safe to call twice."""
        ...
