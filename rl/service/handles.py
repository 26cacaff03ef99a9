"""``Sampler`` and ``Learner`` over an engine and a trainer, wherever they run: a ``Caller`` carries each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.rl.types import Adapter, Completion, OptimParams, OptimResult, Prompt, SamplingParams, Scores, TrainBatch

if TYPE_CHECKING:
    from posttrain.rl.algorithms.base import Algorithm
    from posttrain.rl.metrics import Metric


class Caller(Protocol):
    """Calls methods of one object, one after the other, without blocking the event loop."""

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The method's result; its exceptions are raised here."""
        ...

    async def close(self) -> None:
        """Call the object's own ``close`` and let go of what it runs on; may come twice."""
        ...


class SamplerHandle:
    """``Sampler`` over an ``Engine``."""

    def __init__(self, call: Caller) -> None:
        self._call = call

    async def sample(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
        """See ``Sampler``."""
        return await self._call("generate", prompts, n, params)

    async def load_adapter(self, adapter: Adapter) -> str:
        """See ``Sampler``."""
        return await self._call("load_adapter", adapter)

    async def sleep(self) -> None:
        """See ``Sampler``."""
        await self._call("sleep")

    async def wake(self) -> None:
        """See ``Sampler``."""
        await self._call("wake")

    async def close(self) -> None:
        """See ``Sampler``."""
        await self._call.close()


class LearnerHandle:
    """``Learner`` over a ``Trainer``."""

    def __init__(self, call: Caller) -> None:
        self._call = call

    async def score(self, batches: Sequence[TrainBatch], *, reference: bool = False) -> list[Scores]:
        """See ``Learner``."""
        return await self._call("score", batches, reference=reference)

    async def forward_backward(self, batches: Sequence[TrainBatch], algorithm: Algorithm) -> dict[str, Metric]:
        """See ``Learner``."""
        return await self._call("forward_backward", batches, algorithm)

    async def optim_step(self, params: OptimParams) -> OptimResult:
        """See ``Learner``."""
        return await self._call("optim_step", params)

    async def reset_optimizer(self) -> None:
        """See ``Learner``."""
        await self._call("reset_optimizer")

    async def export_adapter(self) -> Adapter:
        """See ``Learner``."""
        return await self._call("export_adapter")

    async def checksum(self) -> str:
        """See ``Learner``."""
        return await self._call("checksum")

    async def save(self, folder: Path) -> None:
        """See ``Learner``."""
        await self._call("save", folder)

    async def load(self, folder: Path) -> None:
        """See ``Learner``."""
        await self._call("load", folder)

    async def memory(self) -> Mapping[str, float]:
        """See ``Learner``."""
        return await self._call("memory")

    async def close(self) -> None:
        """See ``Learner``."""
        await self._call.close()
