"""The thread of a pool: hands calls to workers, holds them to their time, and replaces workers that ended."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from typing import Any

from posttrain.rl.errors import PosttrainError
from posttrain.rl.rewards.pool_calls import Call, Crashed, Failed, Function, TimedOut, Worker
from posttrain.rl.rewards.pool_worker import MAX_REPLY_BYTES
from posttrain.rl.rewards.process_tree import kill_tree

LOAD_TIMEOUT_S = 120.0
"""Importing what a function needs, which no call's time limit includes."""
CLOSE_TIMEOUT_S = 10.0
_BOOTSTRAP = """import json, sys
sys.path[:] = json.loads(sys.argv.pop())
from posttrain.rl.rewards.pool_keeper import main
main()"""


class Dispatcher:
    """Owned by its thread; other threads only ``submit``, ``wake`` and ``stop``."""

    def __init__(self, workers: int, memory_mib: int) -> None:
        self.pid = os.getpid()
        self._most = workers
        self._memory_mib = memory_mib
        self._lock = threading.Lock()
        self._open = True
        self._queue: deque[Call] = deque()
        self._workers: dict[int, Worker] = {}
        self._started = 0
        self._imported: set[str] = set()
        self._keeper: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._reports = bytearray()
        self._ready = False
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._alarm, self._bell = socket.socketpair()
        self._bell.setblocking(False)
        self._alarm.setblocking(False)
        self._selector.register(self._alarm, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="reward-pool", daemon=True)
        self._thread.start()

    def submit(self, call: Call) -> None:
        """Queue a call; its future tells how it went. A cancelled future ends the call."""
        call.future.add_done_callback(lambda future: self.wake() if future.cancelled() else None)
        with self._lock:
            if not self._open:
                raise RuntimeError("this pool is closed")
            self._queue.append(call)
        self.wake()

    def wake(self) -> None:
        """Have the thread look at the queue again."""
        with contextlib.suppress(BlockingIOError, OSError):  # full: it is awake; closed: nothing is left to do
            self._bell.send(b"!")

    def stop(self) -> None:
        """End every process and the thread; calls still under way fail."""
        if os.getpid() != self.pid:  # a fork's copy: the processes are its parent's
            return
        self._stopping = True
        self.wake()
        if threading.current_thread() is not self._thread:  # where garbage is collected, nobody chooses
            self._thread.join()

    # The thread

    def _run(self) -> None:
        reason = "the pool was closed"
        try:
            while not self._stopping:
                self._dispatch()
                now = time.monotonic()
                deadlines = [worker.deadline for worker in self._workers.values() if worker.deadline is not None]
                wait = max(0.0, min(deadlines) - now) if deadlines else None
                for key, events in self._selector.select(wait):
                    self._attend(key, events)
                self._expire()
        except OSError as error:  # no process or socket to be had
            reason = f"the pool ended: {error}"
        finally:
            self._end(reason)

    def _attend(self, key: selectors.SelectorKey, events: int) -> None:
        if key.fileobj is self._alarm:
            with contextlib.suppress(BlockingIOError):
                self._alarm.recv(4096)
        elif key.fileobj is self._control:
            self._listen()
        elif not key.data.ending:
            if events & selectors.EVENT_WRITE:
                self._flush(key.data)
            if events & selectors.EVENT_READ and not key.data.ending:
                self._receive(key.data)

    def _dispatch(self) -> None:
        while self._queue:
            call = self._queue[0]
            if call.future.cancelled():
                self._queue.popleft()
                continue
            idle = [worker for worker in self._workers.values() if worker.idle]
            worker = next((worker for worker in idle if call.function.number in worker.loaded), None)
            if worker is None and idle:
                worker = idle[0]
            if worker is None and sum(not worker.ending for worker in self._workers.values()) < self._most:
                worker = self._start([call.function])
            if worker is None:
                return
            self._queue.popleft()
            worker.call = call
            if worker.loading is None:
                if call.function.number not in worker.loaded:
                    worker.to_load.append(call.function)
                self._advance(worker)

    def _advance(self, worker: Worker) -> None:
        """Send what comes next for this worker."""
        worker.deadline = None
        if worker.to_load:
            worker.loading = function = worker.to_load.popleft()
            worker.deadline = time.monotonic() + LOAD_TIMEOUT_S
            self._send(worker, ("load", function.number, [*map(str, sys.path)], function.pickled, function.module))
        elif worker.call is not None:
            call = worker.call
            if call.memory_mib != worker.memory_mib:
                worker.memory_mib = call.memory_mib
                self._order("limit", worker.number, call.memory_mib)
            worker.deadline = time.monotonic() + call.timeout_s
            self._send(worker, ("call", id(call), call.function.number, call.memory_mib, call.arguments))

    def _send(self, worker: Worker, message: tuple[Any, ...]) -> None:
        data = pickle.dumps(message, protocol=5)
        worker.outbox += struct.pack("!I", len(data)) + data
        self._flush(worker)

    def _flush(self, worker: Worker) -> None:
        try:
            with contextlib.suppress(BlockingIOError):
                while worker.outbox:
                    del worker.outbox[: worker.connection.send(worker.outbox)]
        except OSError:
            self._lose(worker)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outbox else 0)
        if self._selector.get_key(worker.connection).events != wanted:
            self._selector.modify(worker.connection, wanted, worker)

    def _receive(self, worker: Worker) -> None:
        try:
            data = worker.connection.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        worker.inbox += data
        size = struct.unpack_from("!I", worker.inbox)[0] if len(worker.inbox) >= 4 else 0
        if not data or size > MAX_REPLY_BYTES:
            self._lose(worker, "its answer is too large" if data else None)
        elif len(worker.inbox) >= 4 + size > 4:
            reply = bytes(worker.inbox[4 : 4 + size])
            del worker.inbox[: 4 + size]
            try:
                self._understand(worker, *json.loads(reply))
            except (TypeError, ValueError, RecursionError):  # not the worker's own words
                self._lose(worker, "something else wrote into its connection")

    def _understand(self, worker: Worker, what: str, number: int, *rest: Any) -> None:
        call, function = worker.call, worker.loading
        if function is not None and number == function.number and what in ("loaded", "unloadable"):
            worker.loading = None
            if what == "loaded":
                worker.loaded[function.number] = function
            elif call is not None and call.function is function:
                worker.call = None
                call.fail(Failed(*rest))
        elif call is not None and function is None and number == id(call):
            worker.call = None
            if what == "returned":
                call.answer(*rest)
            else:
                call.fail(Failed(*rest) if what == "raised" else Crashed(*rest))
        else:
            raise ValueError(what)
        self._advance(worker)

    def _lose(self, worker: Worker, reason: str | None = None) -> None:
        """Its connection is of no more use: kill it; its call fails when the keeper has said why it ended."""
        worker.reason = reason
        self._selector.unregister(worker.connection)
        worker.connection.close()
        worker.ending, worker.deadline = True, None
        self._order("kill", worker.number)

    def _expire(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers.values()):
            call = worker.call
            late = worker.deadline is not None and now >= worker.deadline
            if worker.ending or not (late or (call is not None and call.future.cancelled())):
                continue
            if call is not None and worker.loading is not None:
                call.fail(Crashed(f"what the function imports took more than {LOAD_TIMEOUT_S:.0f} s"))
            elif call is not None:
                call.fail(TimedOut(f"no answer within {call.timeout_s:g} s"))
            self._lose(worker)
            if call is not None:
                self._start(list(worker.loaded.values()))

    # The keeper

    def _start(self, functions: list[Function]) -> Worker:
        """Another worker, which loads ``functions`` first."""
        if self._keeper is None:
            self._start_keeper()
        for name in {function.module[0] for function in functions} - self._imported:
            self._imported.add(name)
            if name.startswith("posttrain."):  # not the user's code: imported once, for all workers to come
                self._order("import", name)
        self._started += 1
        mine, theirs = socket.socketpair()
        with theirs:
            self._order("start", self._started, self._memory_mib, descriptor=theirs.fileno())
        mine.setblocking(False)
        worker = Worker(self._started, mine, self._memory_mib, deque(functions))
        self._workers[worker.number] = worker
        self._selector.register(mine, selectors.EVENT_READ, worker)
        self._advance(worker)
        return worker

    def _start_keeper(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            path = json.dumps([*map(str, sys.path)])
            command = [sys.executable, "-I", "-c", _BOOTSTRAP, str(theirs.fileno()), str(self.pid), path]
            self._keeper = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        self._ready = False
        self._reports.clear()
        self._imported.clear()
        self._selector.register(self._control, selectors.EVENT_READ, None)

    def _order(self, *message: object, descriptor: int | None = None) -> None:
        assert self._control is not None
        data = json.dumps(message).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # then the next read says that it ended
            frame = struct.pack("!I", len(data)) + data
            if descriptor is not None:
                sent = socket.send_fds(self._control, [frame], [descriptor])
                frame = frame[sent:]
            self._control.sendall(frame)

    def _listen(self) -> None:
        assert self._control is not None
        try:
            data = self._control.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self._lose_keeper()
            return
        self._reports += data
        while len(self._reports) >= 4 and len(self._reports) >= 4 + (
            size := struct.unpack_from("!I", self._reports)[0]
        ):
            what, *rest = json.loads(self._reports[4 : 4 + size])
            del self._reports[: 4 + size]
            if what == "ready":
                self._ready = True
            else:
                self._bury(*rest)

    def _bury(self, number: int, reason: str) -> None:
        worker = self._workers.pop(number)
        if not worker.ending:
            self._selector.unregister(worker.connection)
            worker.connection.close()
            worker.ending = True  # an event of its connection may still be in hand
        if worker.call is not None and not worker.call.future.done():
            worker.call.fail(Crashed(worker.reason or reason))
            if worker.loaded and self._keeper is not None:
                self._start(list(worker.loaded.values()))

    def _lose_keeper(self) -> None:
        """It ended by itself: a machine out of memory, or a call that looked for it. A new one starts when needed."""
        status = self._release_keeper()
        if not self._ready:
            error = PosttrainError(
                f"the processes for rewards could not be started: {sys.executable} ended with status {status}; "
                "its own words are above"
            )
            self._queue.extend(worker.call for worker in self._workers.values() if worker.call is not None)
            while self._queue:
                self._queue.popleft().fail(error)
        for number in list(self._workers):
            self._bury(number, "the process that keeps it ended")

    def _release_keeper(self) -> int:
        """Close its socket, which ends it and its workers, and wait for that."""
        assert self._control is not None and self._keeper is not None
        self._selector.unregister(self._control)
        self._control.close()
        try:
            status = self._keeper.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            kill_tree(self._keeper.pid)
            status = self._keeper.wait()
        self._control = self._keeper = None
        return status

    def _end(self, reason: str) -> None:
        with self._lock:
            self._open = False
        if self._keeper is not None:
            self._release_keeper()
        for number in list(self._workers):
            self._bury(number, reason)
        while self._queue:
            self._queue.popleft().fail(Crashed(reason))
        self._selector.close()
        self._alarm.close()
        self._bell.close()
