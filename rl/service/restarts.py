"""How often a run that lost its sampler or its trainer goes on."""

from __future__ import annotations

from posttrain.rl.errors import ActorDied
from posttrain.rl.run_dir import RunDir
from posttrain.rl.service.handles import SamplerOutOfMemory


class Restarts:
    """Counts the restarts since the run last got further than ever before."""

    def __init__(self, limit: int, run: RunDir) -> None:
        self._limit, self._run = limit, run
        self._count = 0
        self._furthest = -1

    def allow(self, error: ActorDied | SamplerOutOfMemory) -> str:
        """Which restart of how many this is, in words; raises ``error`` with the numbers where it is one too many.

        Call before the run directory is cut back to its last checkpoint.
        """
        rows = self._run.metrics()
        reached = rows[-1]["step"] if rows else -1
        if reached > self._furthest:
            self._furthest, self._count = reached, 0
        self._count += 1
        if self._count <= self._limit:
            return f"restart {self._count} of {self._limit}"
        error.args = (f"{error}; {self._verdict()}", *error.args[1:])
        raise error

    def _verdict(self) -> str:
        where = f"step {self._furthest + 1}" if self._furthest >= 0 else "the first step"
        resume = f"go on later with: posttrain train --resume {self._run.path}"
        if self._limit == 0:
            return f"max_restarts = 0, so the run ends in {where}; {resume}"
        return f"that is failure {self._count} in {where}, and max_restarts = {self._limit}; {resume}"
