"""Watches processes of the sandbox: what they print, how long they take, what they leave in their folder."""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from posttrain.rl.rewards.process_tree import descendants, kill_tree

Killed = Literal["time", "output", "files", "threads"]

TICK_S = 0.1
"""Between looks at what a process does not announce."""
CHUNK = 1 << 16
SILENT_TICK_S = 0.001
"""Once its pipes are closed: it is about to end."""
LEFT_IN_PIPES = 16
"""Reads of what an ended process left; a pipe holds one ``CHUNK``."""
THREADS = 64
FILES = 1000


class Watched:
    """A process in a session of its own, with its scratch folder; closing it leaves neither."""

    def __init__(
        self, process: subprocess.Popen[bytes], scratch: Path, *, output_bytes: int, scratch_bytes: int
    ) -> None:
        assert process.stdout is not None and process.stderr is not None
        self.process = process
        self.scratch = scratch
        self.output_bytes = output_bytes
        self.scratch_bytes = scratch_bytes
        self.pipes = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        self.killed: Killed | None = None
        self.started = time.monotonic()
        self.status = 0
        self.seconds = 0.0

    @property
    def output(self) -> list[bytes]:
        """Standard output and standard error, as far as they were read."""
        return [bytes(text) for text in self.pipes.values()]

    def read(self, descriptor: int) -> bool:
        """Take in what a pipe holds; whether there will be more."""
        chunk = os.read(descriptor, CHUNK)
        text = self.pipes[descriptor]
        text += chunk[: self.output_bytes - len(text)]
        if len(chunk) and len(text) >= self.output_bytes:
            self.kill("output")
        return bool(chunk)

    def ended(self) -> bool:
        """Whether it has; it stays a zombie, so that its number still names its process group."""
        if not hasattr(os, "waitid"):  # macOS
            return self.process.poll() is not None
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def inspect(self) -> None:
        """Kill a process that fills its folder or has too many threads."""
        with os.scandir(self.scratch) as entries:
            sizes = [_size(entry) for entry in itertools.islice(entries, FILES + 1)]
        if len(sizes) > FILES or sum(sizes) > self.scratch_bytes:
            self.kill("files")
        running = [self.process.pid, *descendants(self.process.pid)]
        if sum(_threads(pid) for pid in running) > THREADS:
            self.kill("threads")

    def kill(self, reason: Killed | None = None) -> None:
        """End it and everything below it; the first reason stands."""
        if self.process.returncode is not None:
            return
        self.killed = self.killed or reason
        kill_tree(self.process.pid)

    def close(self) -> None:
        """No process, no open pipe and no file is left."""
        self.kill()
        self.status = self.process.wait()
        self.seconds = time.monotonic() - self.started
        if self.status in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
            self.killed = self.killed or "time"
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        _remove(self.scratch)


def watch(running: Sequence[Watched], timeout_s: float) -> None:
    """Until the first process has ended or been killed; whichever reaches a limit of its own is killed."""
    first, deadline, inspected = running[0], time.monotonic() + timeout_s, time.monotonic()
    with selectors.DefaultSelector() as selector:
        for child in running:
            for descriptor in child.pipes:
                selector.register(descriptor, selectors.EVENT_READ, child)

        def read(wait_s: float) -> bool:
            ready = selector.select(wait_s)
            for key, _ in ready:
                if not key.data.read(key.fd):
                    selector.unregister(key.fd)
            return bool(ready)

        while not first.ended() and first.killed is None:
            now = time.monotonic()
            if now >= deadline:
                for child in running:
                    child.kill("time")
            if now - inspected >= TICK_S:
                inspected = now
                for child in running:
                    child.inspect()
            silent = not any(key.data is first for key in selector.get_map().values())
            read(SILENT_TICK_S if silent else TICK_S)
        for child in running:
            child.kill()
        for _ in range(LEFT_IN_PIPES):
            if not read(0):
                break


def _size(entry: os.DirEntry[str]) -> int:
    with contextlib.suppress(FileNotFoundError):
        return entry.stat(follow_symlinks=False).st_blocks * 512
    return 0


def _threads(pid: int) -> int:
    with contextlib.suppress(OSError):
        return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
    return 0


def _remove(folder: Path) -> None:
    """Whatever a program made of it: ``rm`` follows folders deeper than Python's recursion."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        subprocess.run(["rm", "-rf", "--", str(folder)], check=True, stdin=subprocess.DEVNULL)
