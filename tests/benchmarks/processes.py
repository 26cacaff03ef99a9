"""Processes with a time limit that leave nothing behind: the children of Ray and vLLM end with their parent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_MARK = "POSTTRAIN_BENCHMARK"
"""Environment variable by which every descendant is known, in whichever process group or session it is."""


@dataclass(slots=True)
class Job:
    """A running command."""

    name: str
    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    scratch: Path
    """Ray's folder; removed with the job."""
    began: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.began

    def tail(self, lines: int = 15) -> str:
        """The end of what it wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def start(name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Job:
    """Start ``command`` in a session of its own, with a Ray of its own, its output in ``log``."""
    mark, scratch = uuid.uuid4().hex, Path(tempfile.mkdtemp(prefix="r-"))
    own = {
        _MARK: mark,
        "RAY_TMPDIR": str(scratch),  # short: sockets lie under it
        "RAY_prestart_worker_first_driver": "0",  # else Ray starts an idle process a core
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own, **(environment or {})},
            start_new_session=True,
        )
    return Job(name, process, mark, log, scratch)


def kill(job: Job) -> int:
    """End the job and everything it started, at once; returns how many processes were left of it."""
    left = [job.process.pid] if job.process.poll() is None else []
    if left:
        os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()
    for _ in range(3):  # a child may have been started meanwhile
        found = _descendants(job.mark)
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            left.append(pid)
        if not found:
            break
        time.sleep(0.1)
    shutil.rmtree(job.scratch, ignore_errors=True)
    return len(set(left))


def run(job: Job, seconds: float) -> int | None:
    """Wait for a job and clean up behind it; its exit status, or ``None`` where it had to be stopped."""
    try:
        return job.process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill(job)


def _descendants(mark: str) -> list[int]:
    """Processes that carry the mark in the environment they were started with (Linux)."""
    needle = f"{_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if needle in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # gone, or another user's
    return found
