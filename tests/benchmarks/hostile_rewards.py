"""Reward functions that misbehave on one completion of a group of eight, each through ``Rubric.score``.

In the pool of processes a function has this user's rights: what it does to files and sockets is not prevented, only
that it costs more than its own sample. Run by ``rewards.py --only hostile``.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from report import emit

from posttrain.rl.rewards import Rubric, reward
from posttrain.rl.rewards.process_tree import descendants
from posttrain.rl.types import Completion, Prompt

TIMEOUT_S = 2.0
MEMORY_MIB = 512
WRITTEN = Path("/posttrain-hostile-reward")


def sleeps_forever() -> None:
    while True:
        time.sleep(3600)


def spins() -> None:
    while True:
        pass


def spins_in_c() -> None:
    sum(iter(int, 1))


def forks() -> None:
    """Forty children in sessions of their own, which ignore what can be ignored."""
    for _ in range(40):
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sleeps_forever()
    sleeps_forever()


def allocates_10_gib() -> None:
    held = [b"x" * (64 << 20) for _ in range(160)]
    time.sleep(len(held))


def exits() -> None:
    os._exit(0)


def crashes() -> None:
    ctypes.string_at(0)


def kills_its_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1)


def closes_every_file() -> None:
    os.closerange(0, 4096)


def writes_to_the_root() -> None:
    """Endlessly; where the user may not, the first write raises."""
    with WRITTEN.open("wb") as file:
        while True:
            file.write(b"x" * (1 << 20))


def opens_a_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.accept()


def prints_gigabytes() -> None:
    line = "x" * (1 << 20)
    while True:
        print(line)
        print(line, file=sys.stderr)


def writes_to_every_descriptor() -> None:
    """Also into what it speaks to the pool through."""
    for descriptor in range(64):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\x00" * 4096)


def returns_a_gigabyte() -> bytes:
    return b"x" * (1 << 30)


def raises_system_exit() -> None:
    raise SystemExit


ACTS: list[Callable[[], object]] = [
    sleeps_forever,
    spins,
    spins_in_c,
    forks,
    allocates_10_gib,
    exits,
    crashes,
    kills_its_parent,
    closes_every_file,
    writes_to_the_root,
    opens_a_socket,
    prints_gigabytes,
    writes_to_every_descriptor,
    returns_a_gigabyte,
    raises_system_exit,
]


def scoring(act: Callable[[], object]) -> Callable[[str], float]:
    """1 for every completion, but for the one on which ``act`` is called."""

    @reward(name="hostile", timeout=TIMEOUT_S, memory_mib=MEMORY_MIB, on_error="zero")
    def hostile(completion: str) -> float:
        return act() if completion == "hostile" else 1.0  # type: ignore[return-value]

    return hostile


def hostile() -> None:
    """A line for each: what it cost, and what is left of it."""
    texts = ["fine"] * 3 + ["hostile"] + ["fine"] * 4
    group = (Prompt("p", "", {}), [Completion((), (), text, "stop", 0) for text in texts])
    for act in ACTS:
        before = set(descendants(os.getpid()))
        with removed(WRITTEN):
            rubric = Rubric([scoring(act)])
            began = time.perf_counter()
            [found] = asyncio.run(rubric.score([group]))
            seconds = time.perf_counter() - began
            [after] = asyncio.run(rubric.score([(group[0], group[1][:1])]))  # the pool still works
            rubric.close()
            written_mib = WRITTEN.stat().st_size >> 20 if WRITTEN.exists() else 0
        scores = [rollout.reward for rollout in found.rollouts]
        emit(
            "hostile",
            act.__name__,
            cost=f"{sum(score != 1.0 for score in scores)} sample",
            counted_as=found.rollouts[3].failures.get("hostile", "nothing"),
            seconds=seconds,
            works_after=after.rollouts[0].reward == 1.0,
            processes_left=len(set(descendants(os.getpid())) - before),
            written_mib=written_mib,
        )


@contextlib.contextmanager
def removed(file: Path) -> Iterator[None]:
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
