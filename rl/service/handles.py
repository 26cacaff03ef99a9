"""``Sampler`` and ``Learner`` over an engine and a trainer, wherever they run: a ``Caller`` carries each call."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.rl.errors import OutOfMemory
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

if TYPE_CHECKING:
    from posttrain.rl.algorithms.base import Algorithm
    from posttrain.rl.metrics import Metric
    from posttrain.rl.service.protocols import Learner, Sampler


class Caller(Protocol):
    """Calls methods of one object, one after the other, without blocking the event loop."""

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The method's result; its exceptions are raised here."""
        ...

    def stream(self, method: str, *args: Any) -> AsyncGenerator[Any]:
        """What a generator method yields, each item as soon as it is there. Closed early, it closes the generator at
        its next item.
        """
        ...

    async def close(self) -> None:
        """Call the object's own ``close`` and let go of what it runs on; may come twice."""
        ...


class SamplerOutOfMemory(OutOfMemory):
    """The engine's memory ran out, not the trainer's: it has to start again with less room."""


@contextmanager
def of_sampler() -> Iterator[None]:
    """What runs out of memory inside is the sampler."""
    try:
        yield
    except OutOfMemory as error:
        raise SamplerOutOfMemory(str(error)) from None


class SamplerHandle:
    """``Sampler`` over an ``Engine``; raises ``SamplerOutOfMemory``."""

    def __init__(self, call: Caller) -> None:
        self._call = call
        self.members: Sequence[Sampler] = (self,)

    async def sample(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
        """See ``Sampler``."""
        with of_sampler():
            return await self._call("generate", prompts, n, params)

    async def stream(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams
    ) -> AsyncIterator[tuple[int, list[Completion]]]:
        """See ``Sampler``."""
        with of_sampler():
            async with aclosing(self._call.stream("stream", prompts, n, params)) as groups:
                async for drawn in groups:
                    yield drawn

    async def load_adapter(self, adapter: Publication) -> str:
        """See ``Sampler``."""
        with of_sampler():
            return await self._call("load_adapter", adapter)

    async def sleep(self) -> None:
        """See ``Sampler``."""
        await self._call("sleep")

    async def wake(self) -> None:
        """See ``Sampler``."""
        with of_sampler():
            await self._call("wake")

    async def close(self) -> None:
        """See ``Sampler``."""
        await self._call.close()


class LearnerHandle:
    """``Learner`` over a ``Trainer``."""

    def __init__(self, call: Caller) -> None:
        self._call = call
        self.members: Sequence[Learner] = (self,)

    async def score(self, batches: Sequence[TrainBatch], *, reference: bool = False) -> list[Scores]:
        """See ``Learner``."""
        return await self._call("score", batches, reference=reference)

    async def forward_backward(self, batches: Sequence[TrainBatch], algorithm: Algorithm) -> dict[str, Metric]:
        """See ``Learner``."""
        return await self._call("forward_backward", batches, algorithm)

    async def clear_gradients(self) -> None:
        """See ``Learner``."""
        await self._call("clear_gradients")

    async def optim_step(self, params: OptimParams) -> OptimResult:
        """See ``Learner``."""
        return await self._call("optim_step", params)

    async def reset_optimizer(self) -> None:
        """See ``Learner``."""
        await self._call("reset_optimizer")

    async def export_adapter(self) -> Adapter:
        """See ``Learner``."""
        return await self._call("export_adapter")

    async def publish_adapter(self) -> Publication:
        """See ``Learner``."""
        return await self._call("publish_adapter")

    async def checksum(self) -> str:
        """See ``Learner``."""
        return await self._call("checksum")

    async def save(self, folder: Path) -> None:
        """See ``Learner``."""
        await self._call("save", folder)

    async def load(self, folder: Path) -> None:
        """See ``Learner``."""
        await self._call("load", folder)

    async def release_memory(self) -> None:
        """See ``Learner``."""
        await self._call("release_memory")

    async def memory(self) -> Mapping[str, float]:
        """See ``Learner``."""
        return await self._call("memory")

    async def close(self) -> None:
        """See ``Learner``."""
        await self._call.close()
