"""What a pool's thread keeps: functions, calls, workers; and how a call may end."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any


class TimedOut(Exception):
    """The call did not end in time; its process was killed."""


class Crashed(Exception):
    """The call's process ended, or had to be ended; the message is the reason."""


class Failed(Exception):
    """The function itself raised."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message
        self.trace = trace


@dataclass(slots=True, eq=False)
class Function:
    """A function as it is sent to workers, once to each."""

    number: int
    name: str
    pickled: bytes
    module: tuple[str, str]
    """Name and file of the module it comes from."""


@dataclass(slots=True, eq=False)
class Call:
    """One call on its way."""

    function: Function
    arguments: bytes
    timeout_s: float
    memory_mib: int
    future: Future[Any] = field(default_factory=Future)

    def answer(self, value: Any) -> None:
        """Give the caller its value, unless it no longer waits."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(value)

    def fail(self, error: Exception) -> None:
        """Raise at the caller, unless it no longer waits."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class Worker:
    """One process, from the moment it is asked for."""

    number: int
    connection: socket.socket
    memory_mib: int
    to_load: deque[Function]
    """Functions to send before it is of use."""
    loading: Function | None = None
    loaded: dict[int, Function] = field(default_factory=dict)
    call: Call | None = None
    deadline: float | None = None
    inbox: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)
    ending: bool = False
    """Its connection is closed and the keeper's word on why is awaited."""
    reason: str | None = None
    """Why, where that is known better here."""

    @property
    def idle(self) -> bool:
        """Whether it can take a call."""
        return self.call is None and self.loading is None and not self.to_load and not self.ending
