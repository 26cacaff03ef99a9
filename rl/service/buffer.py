"""Batches between the producer and the trainer, with bounded staleness.

Batch ``j`` (counted from 1) may be started once ``j - 1 - max_staleness`` steps are trained and published. With 0 the
two alternate; with 1 batch ``j + 1`` is generated while batch ``j`` trains, always by the policy of step ``j - 1``, so
a run is still reproducible; with more, the policy a batch is drawn from depends on timing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.rl.service.production import Batch
    from posttrain.rl.service.state import Progress


class RolloutBuffer:
    """Finished batches in order, and the gate that holds the producer back."""

    def __init__(self, progress: Progress, max_staleness: int) -> None:
        self._batches = deque(progress.pending)
        self._trained = progress.step
        self._produced = self._batches[-1].step if self._batches else progress.step
        self._cursor = progress.cursor
        self._max_staleness = max_staleness
        self._changed = asyncio.Condition()

    @property
    def next_step(self) -> int:
        """The step whose batch is to be produced next."""
        return self._produced + 1

    @property
    def cursor(self) -> dict[str, Any]:
        """The data cursor after the last batch that was put in."""
        return self._cursor

    def pending(self) -> list[Batch]:
        """Batches produced and not yet taken."""
        return list(self._batches)

    async def wait_for_room(self, step: int) -> None:
        """Return when the batch of ``step`` may be generated."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._trained >= step - 1 - self._max_staleness)

    async def put(self, batch: Batch) -> None:
        """Add the next batch."""
        async with self._changed:
            self._batches.append(batch)
            self._produced, self._cursor = batch.step, batch.cursor
            self._changed.notify_all()

    async def take(self) -> Batch:
        """The oldest batch, waiting for it."""
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._batches))
            return self._batches.popleft()

    async def mark_trained(self, step: int) -> None:
        """The weights of ``step`` are published."""
        async with self._changed:
            self._trained = step
            self._changed.notify_all()
