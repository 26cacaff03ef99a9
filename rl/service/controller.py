"""The loop: produce, train, publish, evaluate, save. Plain asyncio over ``Sampler`` and ``Learner``; no Ray, no torch.

Two tasks: one produces batches as far ahead as ``rollout.max_staleness`` allows, one trains on them. A lock around the
sampler keeps weights from changing inside a batch, so every batch comes from one policy. On-policy, the sampler sleeps
from a batch's last sample to the next batch's first; what a step leaves to write is written while the next one samples.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.rl import metrics
from posttrain.rl.errors import ActorDied
from posttrain.rl.service import state
from posttrain.rl.service.buffer import RolloutBuffer
from posttrain.rl.service.checks import Checks
from posttrain.rl.service.performance import performance
from posttrain.rl.service.weight_sync import publish
from posttrain.rl.timeline import Span, Timeline

if TYPE_CHECKING:
    from posttrain.rl.config import Config
    from posttrain.rl.rewards.alerts import Alerts
    from posttrain.rl.run_dir import RunDir
    from posttrain.rl.service.evaluation import Evaluator
    from posttrain.rl.service.learning import LearningStep
    from posttrain.rl.service.production import Batch, Producer
    from posttrain.rl.service.protocols import Learner, Sampler
    from posttrain.rl.sinks import Sinks
    from posttrain.rl.types import RolloutGroup


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
    alerts: Alerts
    evaluator: Evaluator | None = None
    warm_start: Callable[[], Awaitable[dict[str, float]]] | None = None
    """Supervised steps before step 1; returns figures for the line of step 0."""


class Controller:
    """One run of the loop, from where ``progress`` says it stands."""

    def __init__(self, parts: Parts, progress: state.Progress) -> None:
        self._parts = parts
        self._config = parts.config
        self._on_policy = parts.config.rollout.max_staleness == 0
        self._step = progress.step
        self._policy_version = progress.policy_version
        self._resumed = progress.resumed
        self._saved: int | None = progress.step if progress.resumed else None
        self._between_steps = True  # False until a step is trained, published and logged: not a moment to save
        self._buffer = RolloutBuffer(progress, parts.config.rollout.max_staleness)
        self._sampling = asyncio.Lock()
        self._asleep = True  # or not: waking what is awake does nothing
        self._stop = asyncio.Event()
        self._checks = Checks(parts.config, parts.sinks.message)
        self._timeline = Timeline()

    def request_stop(self) -> None:
        """Save and return at the next moment where nothing is half done."""
        self._stop.set()

    async def run(self) -> None:
        """Train until the last step or a stop; a failure between steps is raised after what is complete was saved.

        A process that died (``ActorDied``) takes that moment with it: there is nothing left to save.
        """
        await self._start()
        producing = asyncio.create_task(self._produce())
        try:
            while self._step < self._config.steps and (batch := await self._next_batch(producing)):
                await self._train(batch)
            await self._save()
        except ActorDied:
            raise
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
        await self._publish({})
        if not self._resumed:
            evaluated, groups = await self._evaluate()
            if figures := figures | evaluated:
                await self._write(figures, evaluated=groups)
            if self._parts.warm_start:
                await self._save()
        self._timeline.cut()

    async def _produce(self) -> None:
        """Fill the buffer as far ahead as it allows."""
        while (step := self._buffer.next_step) <= self._config.steps:
            await self._buffer.wait_for_room(step)
            async with self._sampling:
                if self._stop.is_set():  # a batch begun now would hold up the end, and be drawn again all the same
                    return
                await self._wake()
                await self._buffer.put(await self._parts.producer.produce(step, self._timeline, self._rest))

    async def _wake(self) -> None:
        """The sampler's turn; memory that the trainer only keeps in reserve goes back first."""
        if self._asleep:
            with self._timeline.span("wake"):
                await self._parts.learner.release_memory()
                await self._parts.sampler.wake()
            self._asleep = False

    async def _rest(self) -> None:
        """The sampler has drawn its batch: on-policy, its memory is the trainer's now."""
        if self._on_policy:
            with self._timeline.span("sleep"):
                await self._parts.sampler.sleep()
            self._asleep = True

    async def _next_batch(self, producing: asyncio.Task[None]) -> Batch | None:
        """The next batch, or ``None`` once a stop was asked for; a failure of the producer is raised here."""
        if self._stop.is_set():
            return None
        take = asyncio.create_task(self._buffer.take())
        stop = asyncio.create_task(self._stop.wait())
        try:
            waited: set[asyncio.Task[object]] = {take, stop, producing}
            while not (take.done() or stop.done()):
                with self._timeline.span("wait"):
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if producing.done() and not take.done():  # a batch that is there is trained before a failure shows
                    producing.result()
                waited.discard(producing)
            return take.result() if take.done() else None
        finally:
            take.cancel()
            stop.cancel()

    async def _train(self, batch: Batch) -> None:
        """One step, from a batch to its line of metrics. The next batch may start as soon as the weights are published
        and looked at: memory, metrics, samples and checkpoint follow while the sampler works.
        """
        rescore = self._step == 0
        self._between_steps = False
        with self._timeline.span("train"):
            learned = await self._parts.learning.train(
                batch, self._timeline, policy_version=self._policy_version, rescore=rescore
            )
        values = metrics.values(metrics.merge([batch.metrics, learned]))
        self._checks.step(values, rescored=rescore)
        raised, lines = self._parts.alerts.step(values)
        values |= raised
        for line in lines:
            self._parts.sinks.message(f"alert at step {batch.step}: {line}")
        await self._publish(values)
        self._step = batch.step
        due = self._is_due(self._config.evaluation.every)
        evaluated, groups = await self._evaluate() if due else ({}, [])
        window = self._timeline.cut()
        await self._buffer.mark_trained(self._step)
        measured = performance(values, window, await self._parts.learner.memory(), self._config.rollout.group_size)
        await self._write(values | evaluated | measured, trained=batch.groups, evaluated=groups, spans=window.spans)
        self._between_steps = True
        if not batch.groups:
            self._parts.sinks.message(
                f"step {self._step}: every group earned equal rewards after {self._config.rollout.max_refills} refills"
                "; nothing was trained. The task is too easy or too hard for this policy"
            )
        if (every := self._config.checkpoint.every) and self._step % every == 0:
            await (self._write_checkpoint() if self._on_policy else self._save())

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self._step % every == 0 or self._step == self._config.steps)

    async def _publish(self, values: dict[str, float]) -> None:
        """Give the sampler, which may be asleep, the newest weights, between two batches."""
        with self._timeline.span("wait"):
            await self._sampling.acquire()
        try:
            with self._timeline.span("publish"):
                published = await publish(self._parts.learner, self._parts.sampler, self._timeline)
        finally:
            self._sampling.release()
        self._policy_version = published.policy_version
        self._checks.published(published.fingerprint, values)

    async def _evaluate(self) -> tuple[dict[str, float], list[RolloutGroup]]:
        """Figures of the policy just published, and the samples behind them."""
        if self._parts.evaluator is None:
            return {}, []
        async with self._sampling:
            await self._wake()
            with self._timeline.span("evaluate"):
                return await self._parts.evaluator.evaluate()

    async def _write(
        self,
        figures: dict[str, float],
        *,
        trained: Sequence[RolloutGroup] | None = None,
        evaluated: Sequence[RolloutGroup],
        spans: Sequence[Span] = (),
    ) -> None:
        """Write the line, the samples and the spans of this step: in a thread, so that nothing else is held up."""

        def write() -> None:
            if spans:
                self._parts.run.append_timeline(self._step, spans)
            self._parts.sinks.log(self._step, figures)
            if trained is not None:
                self._parts.sinks.rollouts(self._step, trained)
            if evaluated:
                self._parts.sinks.rollouts(self._step, evaluated, evaluation=True)

        with self._timeline.span("log"):
            await asyncio.to_thread(write)

    async def _save(self) -> None:
        """Write a checkpoint of this moment, unless there is one; waits for a batch in flight and keeps it."""
        if self._saved != self._step:
            async with self._sampling:
                await self._write_checkpoint()

    async def _write_checkpoint(self) -> None:
        """The trainer's state beside the buffer's. An on-policy batch in flight needs no waiting for: drawn again from
        the same cursor by the same weights, it is the same batch.
        """
        progress = state.Progress(self._step, self._buffer.cursor, self._policy_version, self._buffer.pending())
        with self._timeline.span("save"):
            await self._checks.base_unchanged(self._parts.learner)
            with self._parts.run.checkpoint(self._step, keep=self._config.checkpoint.keep) as folder:
                await self._parts.learner.save(folder)
                state.write(folder, progress)
        self._saved = self._step
