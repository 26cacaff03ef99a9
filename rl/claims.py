"""What other runs may still take of a GPU: one that has given its KV cache back while it trains looks idle.

A claim is a small file, one a run and GPU, in a folder of this user's; it counts while the process that wrote it lives.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from posttrain.rl import machine
from posttrain.rl.durable import write_atomically
from posttrain.rl.errors import EngineError
from posttrain.rl.machine import Claim, Gpu


def folder() -> Path:
    """Where this user's claims lie."""
    return Path(tempfile.gettempdir()) / f"posttrain-claims-{os.getuid()}"


@contextmanager
def claimed(gpus: Sequence[Gpu], size: int, run: str) -> Iterator[None]:
    """Tell other runs that this process may take ``size`` bytes of each GPU; ``run`` is how people find it."""
    me = machine.process_stat(os.getpid())
    with ExitStack() as files:
        if me is not None:
            text = json.dumps(asdict(Claim(os.getpid(), me[1], size, run)))
            for gpu in gpus:
                files.callback(_write(gpu, text).unlink, missing_ok=True)
        yield


def live(gpu: Gpu) -> tuple[Claim, ...]:
    """Claims of other processes on a GPU, the largest first; what a killed run has left behind is removed."""
    found = []
    for file in folder().glob(f"{gpu.uuid}_*.json") if gpu.uuid else ():
        with suppress(FileNotFoundError):  # a run that ends right now
            claim = Claim(**json.loads(file.read_text(encoding="utf-8")))
            process = machine.process_stat(claim.pid)
            if process is None or process[1] != claim.started:
                file.unlink(missing_ok=True)
            elif claim.pid != os.getpid():
                found.append(claim)
    return tuple(sorted(found, key=lambda claim: -claim.size))


def unclaimed(total: int, free: int, gpu: Gpu, claims: Sequence[Claim]) -> int:
    """What is left of a GPU when every claim is taken up, and processes of no claim keep what they have."""
    drivers = {claim.pid for claim in claims}
    others = [process.used or 0 for process in gpu.processes if claims and not _descends(process.pid, drivers)]
    return max(0, min(free, total - sum(claim.size for claim in claims) - sum(others)))


def _write(gpu: Gpu, text: str) -> Path:
    file = folder() / f"{gpu.uuid}_{os.getpid()}.json"
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomically(file, text, durable=False)
    except OSError as error:
        raise EngineError(
            f"cannot write {file} ({error.strerror}): set TMPDIR to a folder that can be written"
        ) from None
    return file


def _descends(pid: int, ancestors: set[int]) -> bool:
    """Whether a process, or one that it comes from, is among ``ancestors``."""
    while pid not in ancestors:
        found = machine.process_stat(pid)
        if found is None or found[0] == 0:
            return False
        pid = found[0]
    return True
