"""What a process has started, how much memory that takes, and its end, whole.

Linux lists a process's children under ``/proc``; elsewhere only the process group is known, and memory is not watched.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

ROUNDS = 50
"""Of stopping what is found below a process before killing it; more than one finds what was just being forked."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PDEATHSIG, _CHILD_SUBREAPER = 1, 36


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started or adopted, zombies included."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found.extend(map(int, (thread / "children").read_text().split()))
    return found


def descendants(pid: int) -> list[int]:
    """Everything below ``pid``, parents before their children."""
    found, position = children(pid), 0
    while position < len(found):
        found.extend(children(found[position]))
        position += 1
    return found


def resident_bytes(pid: int) -> int:
    """Memory of one process, 0 where it is gone or cannot be known."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return 0


def kill_tree(pid: int) -> None:
    """Kill a process, its group and everything below it; each is stopped first, so that none forks on."""
    stopped: dict[int, None] = {}
    found = [pid]
    for _ in range(ROUNDS):
        new = [process for process in found if process not in stopped]
        if not new:
            break
        for process in new:
            _signal(process, signal.SIGSTOP)
            stopped[process] = None
        found = descendants(pid)
    for process in reversed(stopped):
        _signal(process, signal.SIGKILL)
    if pid != os.getpgrp():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def die_with_parent(parent: int, how: signal.Signals) -> None:
    """Receive ``how`` when the parent ends, and end now where it already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, int(how), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of whatever is orphaned below this process, so that nothing escapes by forking twice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
