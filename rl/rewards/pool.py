"""Functions in processes that can be stopped: out of time, out of memory or crashed, a call costs only itself.

A pool has a thread that speaks to everything, a keeper process (``pool_keeper.py``) and its workers
(``pool_worker.py``), forked from the keeper and never from this process. It serves any number of threads and event
loops. This contains mistakes, not attacks: a call runs with this user's rights and may write files and use the network;
programs that a model wrote belong in the sandbox. Where there is no ``/proc`` (macOS), memory is not watched and only
a call's process group is killed.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from posttrain.rl import machine
from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards.pool_calls import Call, Crashed, Failed, Function, TimedOut
from posttrain.rl.rewards.pool_dispatch import Dispatcher

MEMORY_MIB = 2048
"""A worker's limit where a call names none."""
MAX_ARGUMENT_BYTES = 64 << 20

__all__ = ["Crashed", "Failed", "Pool", "TimedOut", "shared"]


class Pool:
    """Processes for calls of functions; none is started before the first call, and as many as are needed at once."""

    def __init__(self, workers: int | None = None, memory_mib: int = MEMORY_MIB) -> None:
        """At most ``workers`` processes (by default as many as there are cores, from 2 to 8)."""
        self._workers = workers or min(max(machine.cpus(), 2), 8)
        self._memory_mib = memory_mib
        self._lock = threading.Lock()
        self._dispatcher: Dispatcher | None = None
        self._functions: dict[int, tuple[Callable[..., Any], Function]] = {}
        """By identity; the function itself is held, so that no other takes its place."""
        self._numbers = itertools.count(1)
        self._closed = False

    async def call(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        timeout_s: float,
        memory_mib: int | None = None,
    ) -> Any:
        """``function(**arguments)`` in a worker; plain values and arrays come back as JSON has them.

        Raises ``TimedOut``, ``Crashed`` or ``Failed``, and ``ConfigError`` for what cannot be sent to a process. What
        the function prints goes nowhere, and processes that it leaves behind are killed.
        """
        return await asyncio.wrap_future(self._submit(function, arguments, timeout_s, memory_mib))

    def ask(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        timeout_s: float,
        memory_mib: int | None = None,
    ) -> Any:
        """``call`` for a caller without an event loop: waits in this thread."""
        return self._submit(function, arguments, timeout_s, memory_mib).result()

    def close(self) -> None:
        """End every process; calls still under way fail with ``Crashed``. May be repeated."""
        with self._lock:
            self._closed = True
            dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            dispatcher.stop()

    def _submit(
        self, function: Callable[..., Any], arguments: Mapping[str, Any], timeout_s: float, memory_mib: int | None
    ) -> Future[Any]:
        sent = self._sendable(function)
        data = _pickled(dict(arguments), f"the arguments of {sent.name}")
        if len(data) > MAX_ARGUMENT_BYTES:
            raise ConfigError(
                f"the arguments of {sent.name} take {len(data) >> 20} MiB, and a call in a process may have "
                f"{MAX_ARGUMENT_BYTES >> 20} MiB: ask for fewer columns"
            )
        call = Call(sent, data, timeout_s, int(memory_mib or self._memory_mib))
        self._running().submit(call)
        return call.future

    def _running(self) -> Dispatcher:
        with self._lock:
            if self._closed:
                raise RuntimeError("this pool is closed")
            if self._dispatcher is None or self._dispatcher.pid != os.getpid():
                self._dispatcher = Dispatcher(self._workers, self._memory_mib)
                weakref.finalize(self, self._dispatcher.stop)  # also when the interpreter ends
            return self._dispatcher

    def _sendable(self, function: Callable[..., Any]) -> Function:
        known = self._functions.get(id(function))
        if known is None:
            module = getattr(function, "__module__", None) or type(function).__module__
            name = getattr(function, "__qualname__", type(function).__qualname__)
            file = getattr(sys.modules.get(module), "__file__", None) if module != "__main__" else None
            pickled = _pickled(function, f"the function {name}")
            known = function, Function(next(self._numbers), name, pickled, (module, file or ""))
            self._functions[id(function)] = known
        return known[1]


@functools.cache
def shared() -> Pool:
    """The pool of those who call a built-in by hand; rewards in a run have their own."""
    return Pool(workers=1)


def _pickled(value: object, what: str) -> bytes:
    try:
        data: bytes = cloudpickle.dumps(value)
    except Exception as error:
        raise ConfigError(
            f"{what} cannot be sent to a process ({type(error).__name__}: {error}): keep open files, locks and clients "
            "out of it, or let it run in this process (no timeout, isolate or memory_mib)"
        ) from error
    return data
