"""The process between a pool and its workers: it forks them, watches their memory, and ends them whole.

One thread and no code of the user's, so that a fork is safe and costs milliseconds where an interpreter costs a second.
Everything a worker starts and leaves behind is adopted here and killed. It ends when the pool's end of its socket
closes, or with the process that started it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any

from posttrain.rl.rewards.pool_worker import MARKER, serve
from posttrain.rl.rewards.process_tree import (
    adopt_orphans,
    children,
    descendants,
    die_with_parent,
    kill_tree,
    resident_bytes,
)

WATCH_S = 0.1
"""Between two looks at the workers' memory."""
MAX_PROCESSES = 64
"""That a worker may have started at a time."""


@dataclass(slots=True)
class Ward:
    """A worker as its keeper knows it."""

    number: int
    memory_mib: int
    cause: str | None = None
    """Why it was killed, where that was the keeper's decision."""


class Keeper:
    """Obeys ``["start", number, memory_mib]`` (with a socket), ``["limit", number, memory_mib]``, ``["kill", number]``
    and ``["import", module]``; reports ``["ready"]`` and ``["dead", number, reason]``. All are JSON behind a length.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._wards: dict[int, Ward] = {}
        """By process id."""
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)

    def run(self) -> None:
        """Until the pool closes its end."""
        signal.signal(signal.SIGCHLD, lambda *_: None)  # with a wakeup descriptor: select returns when a worker dies
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._report("ready")
        looked = 0.0
        while True:
            waited: list[Any] = [self._control, self._pipe[0]]
            ready, _, _ = select.select(waited, [], [], WATCH_S if self._wards else None)
            if self._pipe[0] in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._pipe[0], 4096)
            if self._control in ready and not self._obey():
                return
            self._reap()
            if time.monotonic() - looked >= WATCH_S:
                self._watch()
                looked = time.monotonic()

    def end(self) -> None:
        """Kill every worker and everything that ever came from one."""
        while below := children(os.getpid()):
            for pid in below:
                kill_tree(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)
        for pid in self._wards:  # where nobody lists children
            kill_tree(pid)

    def _obey(self) -> bool:
        header, descriptors, _, _ = socket.recv_fds(self._control, 4, 1)
        if not header:
            return False
        header += _exactly(self._control, 4 - len(header))
        what, *arguments = json.loads(_exactly(self._control, struct.unpack("!I", header)[0]))
        meant = [(pid, ward) for pid, ward in self._wards.items() if ward.number == arguments[0]]
        if what == "start":
            number, memory_mib = arguments
            self._start(number, memory_mib, socket.socket(fileno=descriptors[0]))
        elif what == "limit":
            for _, ward in meant:
                ward.memory_mib = arguments[1]
        elif what == "kill":
            for pid, _ in meant:
                kill_tree(pid)
        else:
            assert what == "import", what
            with contextlib.suppress(Exception):  # the worker that needs it will say what is wrong
                importlib.import_module(arguments[0])
        return True

    def _start(self, number: int, memory_mib: int, connection: socket.socket) -> None:
        gc.freeze()
        keeper = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            connection.close()
            self._report("dead", number, f"no process could be started ({error.strerror})")
            return
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                self._control.close()
                for end in self._pipe:
                    os.close(end)
                serve(connection, keeper)
            finally:
                os._exit(1)
        connection.close()
        self._wards[pid] = Ward(number, memory_mib)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            ward = self._wards.pop(pid, None)
            if ward is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
                self._sweep()
                self._report("dead", ward.number, ward.cause or _reason(status))

    def _sweep(self) -> None:
        """Kill what was left behind by workers that are gone."""
        for pid in children(os.getpid()):
            if pid not in self._wards:
                kill_tree(pid)

    def _watch(self) -> None:
        self._sweep()
        for pid, ward in self._wards.items():
            below = descendants(pid)
            used = sum(map(resident_bytes, [pid, *below]))
            if len(below) > MAX_PROCESSES:
                ward.cause = f"it started more than {MAX_PROCESSES} processes"
            elif used > ward.memory_mib << 20:
                ward.cause = f"it used {used >> 20} MiB of memory, more than its limit of {ward.memory_mib} MiB"
            else:
                continue
            kill_tree(pid)

    def _report(self, *message: object) -> None:
        data = json.dumps(message).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # then the next read ends this process
            self._control.sendall(struct.pack("!I", len(data)) + data)


def main() -> None:
    """Serve the pool at the other end of the socket whose descriptor is the first argument."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent, signal.SIGTERM)
    os.environ[MARKER] = "1"
    adopt_orphans()
    keeper = Keeper(socket.socket(fileno=descriptor))
    try:
        keeper.run()
    finally:
        keeper.end()


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            sys.exit(0)
        data += part
    return data


def _reason(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"its process exited with status {code}"
    try:
        return f"its process was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"its process was killed by signal {-code}"
