"""The loop: produce, train, publish, evaluate, save. Plain asyncio over ``Sampler`` and ``Learner``; no Ray, no torch.

Two tasks: one produces batches as far ahead as ``rollout.max_staleness`` allows, one trains on them. A lock around the
sampler keeps weights from changing inside a batch, so every batch comes from one policy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.rl import metrics
from posttrain.rl.service import state
from posttrain.rl.service.buffer import RolloutBuffer
from posttrain.rl.service.checks import Checks
from posttrain.rl.service.weight_sync import publish

if TYPE_CHECKING:
    from posttrain.rl.config import Config
    from posttrain.rl.run_dir import RunDir
    from posttrain.rl.service.evaluation import Evaluator
    from posttrain.rl.service.learning import LearningStep
    from posttrain.rl.service.production import Batch, Producer
    from posttrain.rl.service.protocols import Learner, Sampler
    from posttrain.rl.sinks import Sinks


@dataclass(slots=True, frozen=True)
class Parts:
    """Everything the loop drives; put together by ``rl.service.run`` or by a test."""

    config: Config
    run: RunDir
    sampler: Sampler
    learner: Learner
    producer: Producer
    learning: LearningStep
    sinks: Sinks
    evaluator: Evaluator | None = None
    warm_start: Callable[[], Awaitable[dict[str, float]]] | None = None
    """Supervised steps before step 1; returns figures for the line of step 0."""


class Controller:
    """One run of the loop, from where ``progress`` says it stands."""

    def __init__(self, parts: Parts, progress: state.Progress) -> None:
        self._parts = parts
        self._config = parts.config
        self._step = progress.step
        self._cursor = progress.cursor
        self._policy_version = progress.policy_version
        self._resumed = progress.resumed
        self._saved: int | None = progress.step if progress.resumed else None
        self._between_steps = True  # False until a step is trained, published and logged: not a moment to save
        self._buffer = RolloutBuffer(progress.step, parts.config.rollout.max_staleness, progress.pending)
        self._sampling = asyncio.Lock()
        self._stop = asyncio.Event()
        self._checks = Checks(parts.config, parts.sinks.message)
        self._step_began = time.perf_counter()

    def request_stop(self) -> None:
        """Save and return at the next moment where nothing is half done."""
        self._stop.set()

    async def run(self) -> None:
        """Train until the last step or a stop; a failure between steps is raised after what is complete was saved."""
        await self._start()
        producing = asyncio.create_task(self._produce())
        try:
            while self._step < self._config.steps and (batch := await self._next_batch(producing)):
                await self._train(batch)
            await self._save()
        except Exception:
            if self._between_steps:
                await self._save()
            raise
        finally:
            producing.cancel()
            await asyncio.gather(producing, return_exceptions=True)

    async def _start(self) -> None:
        """Warm up, publish the first weights, and look at the policy once before it is trained."""
        figures: dict[str, float] = {}
        await self._checks.base_unchanged(self._parts.learner)
        if self._parts.warm_start and not self._resumed:
            figures |= await self._parts.warm_start()
        await self._publish()
        if not self._resumed:
            figures |= await self._evaluate()
            if figures:
                self._parts.sinks.log(0, figures)
            if self._parts.warm_start:
                await self._save()
        self._step_began = time.perf_counter()

    async def _produce(self) -> None:
        """Fill the buffer as far ahead as it allows."""
        while (step := self._buffer.next_step) <= self._config.steps:
            await self._buffer.wait_for_room(step)
            async with self._sampling:
                if self._stop.is_set():  # a batch begun now would hold up the end, and be drawn again all the same
                    return
                batch = await self._parts.producer.produce(step)
                if self._config.rollout.max_staleness == 0:
                    await self._parts.sampler.sleep()
                self._cursor = batch.cursor
                await self._buffer.put(batch)

    async def _next_batch(self, producing: asyncio.Task[None]) -> Batch | None:
        """The next batch, or ``None`` once a stop was asked for; a failure of the producer is raised here."""
        if self._stop.is_set():
            return None
        take = asyncio.create_task(self._buffer.take())
        stop = asyncio.create_task(self._stop.wait())
        try:
            waited: set[asyncio.Task[object]] = {take, stop, producing}
            while not (take.done() or stop.done()):
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if producing.done() and not take.done():  # a batch that is there is trained before a failure shows
                    producing.result()
                waited.discard(producing)
            return take.result() if take.done() else None
        finally:
            take.cancel()
            stop.cancel()

    async def _train(self, batch: Batch) -> None:
        """One step, from a batch to its line of metrics."""
        began = time.perf_counter()
        rescore = self._step == 0
        self._between_steps = False
        learned = await self._parts.learning.train(batch, policy_version=self._policy_version, rescore=rescore)
        values = metrics.values(metrics.merge([batch.metrics, learned]))
        self._checks.step(values, rescored=rescore)
        trained = time.perf_counter()
        await self._publish(values)
        self._step = batch.step
        values |= await self._performance(values, train_s=trained - began, publish_s=time.perf_counter() - trained)
        if self._is_due(self._config.evaluation.every):  # before the next batch may start: the sampler is awake
            values |= await self._evaluate()
        self._step_began = time.perf_counter()
        self._parts.sinks.log(self._step, values)
        self._parts.sinks.rollouts(self._step, batch.groups)
        self._between_steps = True
        await self._buffer.mark_trained(self._step)
        if not batch.groups:
            self._parts.sinks.message(
                f"step {self._step}: every group earned equal rewards after {self._config.rollout.max_refills} refills"
                "; nothing was trained. The task is too easy or too hard for this policy"
            )
        if (every := self._config.checkpoint.every) and self._step % every == 0:
            await self._save()

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self._step % every == 0 or self._step == self._config.steps)

    async def _publish(self, values: dict[str, float] | None = None) -> None:
        """Give the sampler the newest weights, between two batches."""
        async with self._sampling:
            await self._parts.sampler.wake()
            published = await publish(self._parts.learner, self._parts.sampler)
        self._policy_version = published.policy_version
        self._checks.published(published.fingerprint, values or {})

    async def _evaluate(self) -> dict[str, float]:
        if self._parts.evaluator is None:
            return {}
        async with self._sampling:
            figures, groups = await self._parts.evaluator.evaluate()
        self._parts.sinks.rollouts(self._step, groups, evaluation=True)
        return figures

    async def _performance(self, values: dict[str, float], *, train_s: float, publish_s: float) -> dict[str, float]:
        """Seconds of each phase, and sampled tokens a second of the whole step."""
        seconds = time.perf_counter() - self._step_began
        completions = values.get("rollout/groups", 0.0) * self._config.rollout.group_size
        tokens = completions * values.get("rollout/completion_tokens", 0.0)
        memory = await self._parts.learner.memory()
        return {
            "perf/tokens_per_second": tokens / seconds,
            **{f"perf/{key}": figure for key, figure in memory.items()},
            "time/train_s": train_s,
            "time/publish_s": publish_s,
            "time/step_s": seconds,
        }

    async def _save(self) -> None:
        """Write a checkpoint of this moment, unless there is one; waits for a batch in flight and keeps it."""
        if self._saved == self._step:
            return
        async with self._sampling:
            await self._checks.base_unchanged(self._parts.learner)
            progress = state.Progress(self._step, self._cursor, self._policy_version, self._buffer.pending())
            with self._parts.run.checkpoint(self._step, keep=self._config.checkpoint.keep) as folder:
                await self._parts.learner.save(folder)
                state.write(folder, progress)
        self._saved = self._step
