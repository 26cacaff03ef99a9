"""Ray actors: the engine and the trainer as they are, each in a process of its own, and a ``Caller`` to reach them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from posttrain.rl.errors import ActorDied, PosttrainError

CLOSE_SECONDS = 20.0
"""How long an actor may take to close what it holds."""


@contextmanager
def ray_session() -> Iterator[None]:
    """Use the Ray that is already connected; otherwise start one on this machine and stop it at the end."""
    if ray.is_initialized():
        yield
        return
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(slots=True, frozen=True)
class Resources:
    """What an actor may use."""

    cpu_threads: int
    gpu_share: float
    """0.5 lets two actors share one GPU; 0 for none."""


class _Host:
    """What the actor's process runs. It builds its object in a call of its own: an exception from an actor's
    constructor would arrive as text only.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._target: Any = None

    def build(self) -> None:
        """Make the object."""
        self._target = self._make()

    def close(self) -> None:
        """Close the object, if it was ever built."""
        if self._target is not None:
            self._target.close()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run one method of the object."""
        return getattr(self._target, method)(*args, **kwargs)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        """Run one generator method of the object."""
        yield from getattr(self._target, method)(*args)


class ActorCaller:
    """A ``Caller`` over one Ray actor that lives and dies with it."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor = actor
        self._name = name
        self._open = True

    @classmethod
    async def build(cls, name: str, resources: Resources, make: Callable[[], Any]) -> ActorCaller:
        """Start an actor and wait until it has called ``make``."""
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": resources.gpu_share}
        options |= {"max_restarts": 0, "max_task_retries": 0}
        options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(resources.cpu_threads)}}
        caller = cls(ray.remote(_Host).options(**options).remote(make), name)
        try:
            await caller._result(caller._actor.build.remote())
        except BaseException:
            await caller.close()
            raise
        return caller

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See ``Caller``; our own errors arrive as they were raised, a dead process as ``EngineError``."""
        return await self._result(self._actor.call.remote(method, *args, **kwargs))

    async def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        """See ``Caller``."""
        async for reference in self._actor.stream.options(num_returns="streaming").remote(method, *args):
            yield await self._result(reference)

    async def close(self) -> None:
        """See ``Caller``."""
        if self._open:
            self._open = False
            with suppress(RayError, TimeoutError):  # a dead or stuck process is only ended
                await asyncio.wait_for(self._actor.close.remote(), CLOSE_SECONDS)
            ray.kill(self._actor)

    async def _result(self, reference: Any) -> Any:
        try:
            return await reference
        except RayTaskError as error:
            if isinstance(error.cause, PosttrainError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise ActorDied(
                f"the {self._name}'s process died ({str(error).splitlines()[0]}); "
                "resume the run from its last checkpoint with: posttrain train --resume RUN",
                self._name,
            ) from None
