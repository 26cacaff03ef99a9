"""Several GPUs as one: ``LearnerGroup`` deals a step out to its trainers, ``SamplerGroup`` routes prompts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from posttrain.rl import metrics
from posttrain.rl.errors import ActorDied, EngineError, PosttrainError
from posttrain.rl.packing import tokens
from posttrain.rl.repack import Deal, deal

if TYPE_CHECKING:
    from posttrain.rl.algorithms.base import Algorithm
    from posttrain.rl.metrics import Metric
    from posttrain.rl.service.protocols import Learner, Sampler
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

T = TypeVar("T")

GRACE_SECONDS = 10.0
"""What trainers that wait for one another have left when one of them has failed."""


class LearnerGroup:
    """``Learner`` over one trainer a GPU, all with the same weights, which sum their gradients in ``optim_step``."""

    def __init__(self, members: Sequence[Learner], *, share_prompts: bool = False) -> None:
        self.members = tuple(members)
        self._share = share_prompts

    async def score(self, batches: Sequence[TrainBatch], *, reference: bool = False) -> list[Scores]:
        """See ``Learner``."""
        dealt = self._deal(batches)
        scored = await _all(m.score(share, reference=reference) for m, share in self._each(dealt))
        return dealt.collect(scored)

    async def forward_backward(self, batches: Sequence[TrainBatch], algorithm: Algorithm) -> dict[str, Metric]:
        """See ``Learner``."""
        dealt = self._deal(batches)
        return metrics.merge(await _all(m.forward_backward(share, algorithm) for m, share in self._each(dealt)))

    async def clear_gradients(self) -> None:
        """See ``Learner``."""
        await _all(member.clear_gradients() for member in self.members)

    async def optim_step(self, params: OptimParams) -> OptimResult:
        """See ``Learner``. Trainers that still wait for a failed one after ``GRACE_SECONDS`` are closed."""
        results = await self._together(params)
        if len({result.policy_version for result in results}) > 1:
            raise EngineError(f"the trainers of {len(results)} GPUs are at different steps: {results}")
        return results[0]

    async def reset_optimizer(self) -> None:
        """See ``Learner``."""
        await _all(member.reset_optimizer() for member in self.members)

    async def export_adapter(self) -> Adapter:
        """See ``Learner``."""
        return await self.members[0].export_adapter()

    async def publish_adapter(self) -> Publication:
        """See ``Learner``: the first member's, for the sampler on its GPU; ``weight_sync`` publishes pair by pair."""
        return await self.members[0].publish_adapter()

    async def checksum(self) -> str:
        """See ``Learner``; raises ``EngineError`` where the members' differ."""
        return _same("the trainers hold different base weights", await _all(m.checksum() for m in self.members))

    async def save(self, folder: Path) -> None:
        """See ``Learner``. All hold the same: the first one writes."""
        await self.members[0].save(folder)

    async def load(self, folder: Path) -> None:
        """See ``Learner``. Every member reads ``folder``: on several machines it lies where all of them see it."""
        await _all(member.load(folder) for member in self.members)

    async def release_memory(self) -> None:
        """See ``Learner``."""
        await _all(member.release_memory() for member in self.members)

    async def memory(self) -> Mapping[str, float]:
        """See ``Learner``: of each figure the largest."""
        parts = await _all(member.memory() for member in self.members)
        return {key: max(part[key] for part in parts) for key in parts[0]}

    async def close(self) -> None:
        """See ``Learner``; the others are closed even where one fails."""
        await _all(member.close() for member in self.members)

    def _deal(self, batches: Sequence[TrainBatch]) -> Deal:
        """Under the largest micro-batch that was asked for, so that whoever makes them smaller is heeded."""
        budget = max((tokens(batch, share=self._share) for batch in batches), default=1)
        return deal(batches, len(self.members), budget, share_prompts=self._share)

    def _each(self, dealt: Deal) -> Iterable[tuple[Learner, list[TrainBatch]]]:
        return zip(self.members, dealt.shares, strict=True)

    async def _together(self, params: OptimParams) -> list[OptimResult]:
        """Step all members, which wait for one another inside.

        One that fails before it gets there would leave the rest waiting until the sum's timeout. A call in flight
        cannot be called off: only its process can be ended, and the trainers have to start anew in any case.
        """
        tasks = {asyncio.ensure_future(member.optim_step(params)): member for member in self.members}
        try:
            _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if waiting:
                _, waiting = await asyncio.wait(waiting, timeout=GRACE_SECONDS)
            await asyncio.gather(*(tasks[task].close() for task in waiting), return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
        return _results(await asyncio.gather(*tasks, return_exceptions=True))


class SamplerGroup:
    """``Sampler`` over one engine a GPU. Engines ask for prompts when they have none, so a faster one draws more; all
    samples of a prompt come from one engine, which computes the prompt once. Seeds belong to prompts, not to engines.
    """

    def __init__(self, members: Sequence[Sampler], concurrency: int) -> None:
        """``concurrency``: sequences that one engine decodes at once. It is given twice as many or more: an engine that
        refills its batch has less and less to do as a chunk runs out.
        """
        self.members = tuple(members)
        self._concurrency = concurrency
        self._busy = [asyncio.Lock() for _ in members]

    async def sample(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
        """See ``Sampler``."""
        drawn = {index: completions async for index, completions in self.stream(prompts, n, params)}
        return [drawn[index] for index in range(len(prompts))]

    async def stream(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams
    ) -> AsyncIterator[tuple[int, list[Completion]]]:
        """See ``Sampler``; what one engine raises ends the stream."""
        costs = [len(prompt.prompt_ids) + n * params.max_tokens for prompt in prompts]
        waiting = chunks(costs, len(self.members), max(1, 2 * self._concurrency // n))
        arrived: asyncio.Queue[tuple[int, list[Completion]] | BaseException] = asyncio.Queue()

        async def work(member: Sampler, busy: asyncio.Lock) -> None:
            try:
                while waiting:
                    async with busy:
                        if waiting:
                            chunk = waiting.popleft()
                            drawn = member.stream([prompts[index] for index in chunk], n, params)
                            async for place, completions in drawn:
                                arrived.put_nowait((chunk[place], completions))
            except Exception as error:
                arrived.put_nowait(error)

        workers = [asyncio.create_task(work(*pair)) for pair in zip(self.members, self._busy, strict=True)]
        try:
            for _ in prompts:
                item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def load_adapter(self, adapter: Publication) -> str:
        """See ``Sampler``. Through host memory only: what lies on one GPU goes to its own member (``weight_sync``)."""
        held = await _all(member.load_adapter(adapter) for member in self.members)
        return _same("the samplers hold different adapters", held)

    async def sleep(self) -> None:
        """See ``Sampler``."""
        await _all(member.sleep() for member in self.members)

    async def wake(self) -> None:
        """See ``Sampler``."""
        await _all(member.wake() for member in self.members)

    async def close(self) -> None:
        """See ``Sampler``; the others are closed even where one fails."""
        await _all(member.close() for member in self.members)


def chunks(costs: Sequence[int], members: int, least: int) -> deque[list[int]]:
    """Indices of prompts in the chunks in which they are handed out, the next one to whoever is free.

    Rounds of one chunk a member: half of what is left, and the rest at once where a member's part is below twice
    ``least`` prompts. In a round the costliest prompt goes first, to the chunk that costs least so far.
    """
    cut: deque[list[int]] = deque()
    start = 0
    while start < len(costs):
        part = -(-(len(costs) - start) // members)
        size = part if part < 2 * least else part // (2 * least) * least
        round_ = range(start, min(start + size * members, len(costs)))
        dealt: list[list[int]] = [[] for _ in range(members)]
        loads = [0] * members
        for index in sorted(round_, key=lambda index: -costs[index]):
            lightest = min(range(members), key=loads.__getitem__)
            dealt[lightest].append(index)
            loads[lightest] += costs[index]
        cut.extend(sorted(chunk) for chunk in dealt if chunk)
        start = round_.stop
    return cut


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Every result, once all calls have ended."""
    return _results(await asyncio.gather(*calls, return_exceptions=True))


def _results(outcomes: Sequence[T | BaseException]) -> list[T]:
    """The results, or of the failures the cause: a process that died before what its death did to others, and those
    before calls that were given up.
    """
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for kind in (ActorDied, PosttrainError, Exception, BaseException):
        for failure in failures:
            if isinstance(failure, kind):
                raise failure
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


def _same(otherwise: str, values: Sequence[str]) -> str:
    if len(set(values)) > 1:
        raise EngineError(f"{otherwise}: {', '.join(values)}")
    return values[0]
