"""Kills the processes of actors in the middle of chosen calls, and notes which actors were made."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable

import pytest

from posttrain.rl.service.actors import ActorCaller

Moment = tuple[str, str, int]
"""Actor, method, and which call of it, from 1."""


class Killing:
    """From now on until ``monkeypatch`` is undone; each moment comes once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, moments: Iterable[Moment]) -> None:
        self.waiting = set(moments)
        """Moments that have not come yet."""
        self.calls: Counter[tuple[str, str]] = Counter()
        self.homes: list[tuple[str, int, float]] = []
        """Name, process id and seconds of each actor that was made, in order."""
        call, stream, make = ActorCaller.__call__, ActorCaller.stream, ActorCaller.make

        async def called(caller, method, *args, **kwargs):
            kill, working = self._due(caller, method), asyncio.ensure_future(call(caller, method, *args, **kwargs))
            if kill:
                await asyncio.sleep(0.01)
                os.kill(caller.home.pid, signal.SIGKILL)
            return await working

        async def streamed(caller, method, *args):
            kill = self._due(caller, method)
            async for item in stream(caller, method, *args):
                yield item
                if kill:
                    os.kill(caller.home.pid, signal.SIGKILL)
                    kill = False

        async def made(caller, maker):
            began = time.monotonic()
            await make(caller, maker)
            self.homes.append((caller.name, caller.home.pid, round(time.monotonic() - began, 1)))

        monkeypatch.setattr(ActorCaller, "__call__", called)
        monkeypatch.setattr(ActorCaller, "stream", streamed)
        monkeypatch.setattr(ActorCaller, "make", made)

    def _due(self, caller: ActorCaller, method: str) -> bool:
        self.calls[caller.name, method] += 1
        moment = (caller.name, method, self.calls[caller.name, method])
        if moment not in self.waiting:
            return False
        self.waiting.remove(moment)
        return True
