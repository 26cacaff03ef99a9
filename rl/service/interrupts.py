"""Running the loop from plain code or from a notebook, and what Ctrl-C means in each."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

R = TypeVar("R")


class Stops:
    """Requests to stop: the first asks the loop to save and end."""

    def __init__(self) -> None:
        self.requested = False
        self._loop = asyncio.get_running_loop()
        self._ask: Callable[[], None] | None = None
        self._say: Callable[[str], None] | None = None

    def connect(self, ask: Callable[[], None], say: Callable[[str], None]) -> None:
        """From now on there is something to save; what was asked before is passed on."""
        self._ask, self._say = ask, say
        if self.requested:
            ask()

    def request(self) -> bool:
        """Ask the loop to stop; false where that is of no use: asked already, or nothing to save yet."""
        if self.requested or self._ask is None or self._say is None:
            return False
        self.requested = True
        self._say("stopping: what is in flight is finished and saved; once more to stop at once")
        self._loop.call_soon_threadsafe(self._ask)
        return True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C and SIGTERM for the while; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if not self.request():
            os._exit(130)  # a thread in the middle of sampling cannot be interrupted; checkpoints are atomic


def run_to_end(job: Callable[[Stops], Coroutine[Any, Any, R]]) -> R:
    """Run a coroutine from plain code, or from a notebook, whose own event loop is busy with the cell."""
    started: list[Stops] = []

    async def listening() -> R:
        stops = Stops()
        started.append(stops)
        with stops.listening():
            return await job(stops)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(listening())
    outcome: list[R] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(asyncio.run(listening()))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="posttrain", daemon=True)
    thread.start()
    while thread.is_alive():
        try:
            thread.join(0.2)
        except KeyboardInterrupt:
            if not (started and started[0].request()):  # the cell ends at once; its kernel and the thread live on
                raise
    if failure:
        raise failure[0]
    return outcome[0]
