"""One rank in a process of its own, a ``Caller``. As a script it is that process: pickled calls come in on its standard
input, pickled answers go out on its standard output.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from typing import Any

from posttrain.rl.errors import ActorDied


class RankProcess:
    """A process and its one object: what ``make`` was given makes, or the bare weights of ``make_weights``."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(self.call, method, *args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            pickle.dump((method, args, kwargs), self.process.stdin)
            self.process.stdin.flush()
            kind, answer = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            raise ActorDied(f"rank {self._rank} died", f"trainer {self._rank}") from None
        if kind == "error":
            raise answer
        return answer

    async def close(self) -> None:
        if self.process.poll() is None:
            await self("close")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with suppress(BrokenPipeError):  # what the dead process never read
            self.process.stdin.close()


def serve() -> None:
    """Answer calls until the other end is gone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    target: Any = None
    while True:
        try:
            method, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if method == "make":
                target, answer = args[0](), None
            elif method == "make_weights":
                target, answer = make_weights(*args), None
            elif method == "summed_gradients":
                answer = summed_gradients(target)
            else:
                answer = getattr(target, method)(*args, **kwargs)
            reply = ("ok", answer)
        except Exception as error:
            reply = ("error", error)
        pickle.dump(reply, answers)
        answers.flush()


def make_weights(ranks: Any, dtype: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
    """Weights that only know how to be summed."""
    import torch

    class Weights:
        def __init__(self) -> None:
            self._weights = {name: torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for name, s in shapes.items()}
            ranks.connect(torch.device("cpu"))

        def sum(self, gradients: dict[str, Any]) -> dict[str, Any]:
            for name, weight in self._weights.items():
                weight.grad = gradients[name]
            ranks.sum_gradients(self._weights)
            return {name: weight.grad for name, weight in self._weights.items()}

        def optim_step(self, params: Any) -> None:
            self.sum(dict.fromkeys(self._weights))

        def close(self) -> None:
            ranks.close()

    return Weights()


def summed_gradients(trainer: Any) -> dict[str, Any]:
    """What an optimizer step would see; the gradients are cleared."""
    targets = trainer._optimizer.targets()
    if trainer._ranks is not None:
        trainer._ranks.sum_gradients(targets)
    found = {name: None if weight.grad is None else weight.grad.clone() for name, weight in targets.items()}
    trainer.clear_gradients()
    return found


if __name__ == "__main__":
    serve()
