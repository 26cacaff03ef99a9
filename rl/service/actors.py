"""Ray actors: the engine and the trainer as they are, each in a process of its own, and a ``Caller`` to reach them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from posttrain.rl.errors import EngineError, PosttrainError


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


class ActorCaller:
    """A ``Caller`` over one Ray actor that lives and dies with it."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor = actor
        self._name = name
        self._open = True

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See ``Caller``; our own errors arrive as they were raised, a dead process as ``EngineError``."""
        try:
            return await self._actor.call.remote(method, *args, **kwargs)
        except RayTaskError as error:
            if isinstance(error.cause, PosttrainError):
                raise error.cause from None
            raise
        except RayActorError as error:
            raise EngineError(
                f"the {self._name}'s process died ({str(error).splitlines()[0]}); "
                "resume the run from its last checkpoint with: posttrain train --resume RUN"
            ) from None

    async def close(self) -> None:
        """See ``Caller``."""
        if self._open:
            self._open = False
            ray.kill(self._actor)


@dataclass(slots=True, frozen=True)
class Resources:
    """What an actor may use."""

    cpu_threads: int
    gpu_share: float
    """0.5 lets two actors share one GPU; 0 for none."""


class _Host:
    """What the actor's process runs. It builds the object at the first call: an exception from an actor's own
    constructor would arrive as text only.
    """

    def __init__(self, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._build = partial(kind, *args, **kwargs)
        self._target: Any = None

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run one method of the object."""
        if self._target is None:
            self._target = self._build()
        return getattr(self._target, method)(*args, **kwargs)


def start(kind: type, name: str, resources: Resources, *args: Any, **kwargs: Any) -> ActorCaller:
    """Start ``kind(*args, **kwargs)`` as an actor; construction runs in its process, errors show at the first call."""
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": resources.gpu_share}
    options |= {"max_restarts": 0, "max_task_retries": 0}
    options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(resources.cpu_threads)}}
    return ActorCaller(ray.remote(_Host).options(**options).remote(kind, args, kwargs), name)
