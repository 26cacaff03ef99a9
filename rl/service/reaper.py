"""Ends what a run started when the run itself was killed: a process of its own that watches the driver.

Ray ends its servers with the driver, but two of its agents go on for a minute, trying to report to servers that are
gone; workers take seconds. Here they all end at once, and so do shared memory files that nobody else would remove.
As a script it is the watcher; it imports nothing but the standard library.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

POLL_SECONDS = 0.25
GRACE_SECONDS = 5.0
"""How long killed processes may take to vanish: a GPU's memory has to be unmapped first."""

_SHARED_MEMORY = re.compile(r"/dev/shm/(?:torch_|nccl-)\S+")

Process = tuple[int, str]
"""Process id and start time: an id alone may be given out again."""


class Reaper:
    """The driver's side. Without ``/proc`` there is no watcher, and Ray's own ways have to do."""

    def __init__(self, *, own_session: bool) -> None:
        """``own_session``: this process starts the Ray session, so all of it goes when this process does."""
        self._process: subprocess.Popen[bytes] | None = None
        if Path("/proc/self/stat").exists():
            command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *(["session"] if own_session else [])]
            # In a session of its own: Ctrl-C in the terminal is not for it.
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def watch(self, pid: int) -> None:
        """End this process too, though the driver did not start it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(b"%d\n" % pid)
            self._process.stdin.flush()

    def finish(self) -> None:
        """End whatever is left now."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None


def descendants(pid: int, children: Mapping[int, Sequence[Process]] | None = None) -> set[Process]:
    """Every process below ``pid``; ``children`` of each process, by default as they are now."""
    tree = _children() if children is None else children
    below: set[Process] = set()
    todo = [pid]
    while todo:
        for child in tree.get(todo.pop(), []):
            below.add(child)
            todo.append(child[0])
    return below


def _children() -> dict[int, list[Process]]:
    """The children of every process."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := _stat(int(entry.name))) is not None:
            children.setdefault(found[0], []).append((int(entry.name), found[1]))
    return children


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_alive(process: Process) -> bool:
    """Whether it still runs; a zombie does not."""
    found = _stat(process[0])
    return found is not None and found[1] == process[1]


def process_of(pid: int) -> Process | None:
    """The process that has this id now."""
    found = _stat(pid)
    return None if found is None else (pid, found[1])


def _stat(pid: int) -> tuple[int, str] | None:
    """Parent and start time; ``None`` for a process that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19])


def _shared_memory(process: Process) -> set[str]:
    """Shared memory files of torch and NCCL that a process has mapped."""
    try:
        return set(_SHARED_MEMORY.findall(Path(f"/proc/{process[0]}/maps").read_text()))
    except OSError:
        return set()


def _reap(processes: set[Process]) -> None:
    """Kill, wait, remove."""
    left = {process for process in processes if is_alive(process)}
    files = set().union(*map(_shared_memory, left))
    for pid, _ in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end and any(map(is_alive, left)):
        time.sleep(0.02)
    for file in files:
        Path(file).unlink(missing_ok=True)


def _watch(driver: int, own_session: bool) -> None:
    """Follow what is to be ended until the driver is gone or says that it has finished."""
    mark = re.compile(rb"/session_[\d_-]+_%d\b" % driver)  # how Ray names the sessions that this driver starts
    known: set[Process] = set()
    said = b""
    while os.getppid() == driver:
        known = {process for process in known if is_alive(process)}
        tree = _children()
        if own_session:
            known |= {child for child in tree.get(driver, []) if mark.search(_command(child[0]))}
        known = set().union(known, *(descendants(pid, tree) for pid, _ in known))
        if select.select([0], [], [], POLL_SECONDS)[0]:
            read = os.read(0, 4096)
            if not read:
                break
            *lines, said = (said + read).split(b"\n")
            known |= {process for process in map(process_of, map(int, lines)) if process is not None}
    _reap(known)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), "session" in sys.argv[2:])
