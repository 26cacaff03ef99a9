"""The buffer between producer and trainer: order, and the gate that bounds staleness."""

from __future__ import annotations

import asyncio

import pytest

from posttrain.rl.service.buffer import RolloutBuffer
from posttrain.rl.service.production import Batch
from posttrain.rl.service.state import Progress


def batch(step: int) -> Batch:
    return Batch(step, [])


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def has_room(buffer: RolloutBuffer, step: int) -> bool:
    waiting = asyncio.create_task(buffer.wait_for_room(step))
    await settle()
    waiting.cancel()
    return waiting.done() and not waiting.cancelled()


@pytest.mark.parametrize("trained", [0, 5])
@pytest.mark.parametrize("limit", [0, 1, 3])
async def test_a_batch_may_be_started_when_all_but_limit_of_its_predecessors_are_trained(trained, limit) -> None:
    buffer = RolloutBuffer(Progress(trained), limit)
    room = [await has_room(buffer, trained + ahead) for ahead in range(1, 7)]
    assert room == [ahead <= 1 + limit for ahead in range(1, 7)]
    await buffer.mark_trained(trained + 1)
    room = [await has_room(buffer, trained + ahead) for ahead in range(1, 7)]
    assert room == [ahead <= 2 + limit for ahead in range(1, 7)]


async def test_mark_trained_wakes_who_waits() -> None:
    buffer = RolloutBuffer(Progress(0), 0)
    waiting = asyncio.create_task(buffer.wait_for_room(2))
    await settle()
    assert not waiting.done()
    await buffer.mark_trained(1)
    await settle()
    assert waiting.done()


async def test_batches_come_out_in_order_and_are_waited_for() -> None:
    buffer = RolloutBuffer(Progress(0), 3)
    first = asyncio.create_task(buffer.take())
    await settle()
    assert not first.done()
    for step in (1, 2, 3):
        await buffer.put(batch(step))
    assert [(await first).step, (await buffer.take()).step, (await buffer.take()).step] == [1, 2, 3]


async def test_next_step_follows_what_is_there() -> None:
    buffer = RolloutBuffer(Progress(4), 2)
    assert buffer.next_step == 5
    await buffer.put(batch(5))
    await buffer.put(batch(6))
    assert buffer.next_step == 7
    await buffer.take()
    assert buffer.next_step == 7 and [b.step for b in buffer.pending()] == [6]


async def test_batches_of_a_checkpoint_come_first() -> None:
    buffer = RolloutBuffer(Progress(4, pending=[batch(5), batch(6)]), 1)
    assert buffer.next_step == 7
    assert not await has_room(buffer, 7)
    await buffer.mark_trained(5)
    assert await has_room(buffer, 7)
    assert (await buffer.take()).step == 5


async def test_next_step_while_the_last_batch_is_being_trained() -> None:
    """Taken and not yet trained: its step must not be produced a second time."""
    buffer = RolloutBuffer(Progress(4), 1)
    await buffer.put(batch(5))
    await buffer.take()
    assert buffer.next_step == 6


async def test_giving_up_waiting_for_a_batch_loses_none() -> None:
    buffer = RolloutBuffer(Progress(0), 1)
    waiting = asyncio.create_task(buffer.take())
    await settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await buffer.put(batch(1))
    assert (await buffer.take()).step == 1
