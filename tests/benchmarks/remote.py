"""One object in a Ray actor, called and timed; and what the driver says of the GPU's memory, without a CUDA context."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import ray

from posttrain.rl.machine import MIB, gpus


class _Host:
    """What the actor's process runs."""

    def __init__(self) -> None:
        self._target: Any = None
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        logging.getLogger("posttrain").setLevel(logging.INFO)  # the phases of the engine's start, among others

    def ready(self) -> int:
        return os.getpid()

    def build(self, make: Callable[[], Any]) -> float:
        began = time.perf_counter()
        self._target = make()
        return time.perf_counter() - began

    def call(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        result = getattr(self._target, method)(*args, **kwargs)
        return result, time.perf_counter() - began

    def close(self) -> None:
        if self._target is not None:
            self._target.close()


class Remote:
    """Calls wait for their result."""

    def __init__(self, gpu_share: float) -> None:
        """Start the process."""
        self._actor = ray.remote(num_cpus=0, num_gpus=gpu_share, max_restarts=0)(_Host).remote()
        self.pid: int = ray.get(self._actor.ready.remote())
        self.last_seconds = 0.0
        """Of the last call, inside the process."""

    def build(self, make: Callable[[], Any]) -> float:
        """Make the object; seconds it took."""
        return float(ray.get(self._actor.build.remote(make)))

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One method of the object."""
        result, self.last_seconds = ray.get(self._actor.call.remote(method, *args, **kwargs))
        return result

    def close(self) -> None:
        """Close the object and end the process."""
        ray.get(self._actor.close.remote(), timeout=30)
        ray.kill(self._actor)


def used_mib() -> float:
    """In use on the first GPU, by whomever; 0 without a GPU."""
    found = gpus()
    if not found or found[0].total is None or found[0].free is None:
        return 0.0
    return (found[0].total - found[0].free) / MIB


def settled_mib(wait: float = 3.0) -> float:
    """``used_mib`` once two readings in a row agree; memory of a process that ended comes back late."""
    last, deadline = used_mib(), time.monotonic() + wait
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = used_mib()
        if abs(now - last) < 1:
            return now
        last = now
    return last


class CudaContext:
    """An object that opens a CUDA context and nothing else; build it in a ``Remote``."""

    def __init__(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.zeros(1, device="cuda")
            torch.cuda.synchronize()

    def close(self) -> None:
        """The context goes with the process."""
