"""A ``Host`` in this process: the object works on a thread of its own, so that sampler and trainer can overlap."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any


class Threads:
    """``Hosts`` in this process."""

    address = "127.0.0.1"

    def __init__(self, cpu_threads: int) -> None:
        self._cpu_threads = cpu_threads

    def spawn(self, name: str, pair: int, imports: Sequence[str]) -> ThreadCaller:
        """See ``Hosts``; here everything is imported already, or soon."""
        return ThreadCaller(name, self._cpu_threads)


class ThreadCaller:
    """Owns an object (anything with ``close``) that was built, and is called, on one thread of its own."""

    def __init__(self, name: str, cpu_threads: int) -> None:
        self.name = name
        self._target: Any = None
        self._executor = ThreadPoolExecutor(1, name, initializer=partial(_set_threads, cpu_threads))
        self._open = True

    async def make(self, make: Callable[[], Any]) -> None:
        """See ``Host``: on the thread, since loading a model takes long and Ctrl-C must be heard meanwhile."""
        self._target = await asyncio.get_running_loop().run_in_executor(self._executor, make)

    async def alive(self) -> bool:
        """A thread does not die."""
        return True

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See ``Caller``."""
        call = partial(getattr(self._target, method), *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    async def stream(self, method: str, *args: Any) -> AsyncGenerator[Any]:
        """See ``Caller``; the items wait here while nobody asks for them."""
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Any]()
        end, given_up = object(), threading.Event()

        def run() -> None:
            try:
                with closing(getattr(self._target, method)(*args)) as drawn:
                    for item in drawn:
                        if given_up.is_set():
                            return
                        loop.call_soon_threadsafe(items.put_nowait, item)
            finally:
                loop.call_soon_threadsafe(items.put_nowait, end)

        done = loop.run_in_executor(self._executor, run)
        try:
            while (item := await items.get()) is not end:
                yield item
        finally:
            given_up.set()
            await done

    async def close(self) -> None:
        """See ``Caller``; waits for the call in flight."""
        if self._open:
            self._open = False
            if self._target is not None:
                await self("close")
            self._executor.shutdown()


def _set_threads(count: int) -> None:
    """OpenMP keeps its thread count per calling thread, so it has to be set on the thread that computes."""
    import torch

    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread's first look adopts the newest count set on any thread; this was it
