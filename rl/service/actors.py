"""Ray actors: the engine and the trainer as they are, each in a process of its own, and a ``Caller`` to reach them."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from posttrain.rl.errors import ActorDied, EngineError, PosttrainError
from posttrain.rl.service.reaper import Reaper, is_alive, process_of

CLOSE_SECONDS = 20.0
"""How long an actor may take to close what it holds."""
GONE_SECONDS = 30.0
"""How long a killed actor's process may take to vanish, and its GPU memory with it."""
BUNDLES_SECONDS = 60.0
"""How long other work on the cluster may keep the GPUs that are asked for."""


class Actors:
    """``Hosts`` on a Ray cluster: pairs of a sampler and a trainer, a GPU a pair, which the two share."""

    address: str

    def __init__(self, count: int, *, gpu: bool, cpu_threads: int) -> None:
        self._count, self._gpu, self._cpu_threads = count, gpu, cpu_threads
        self._group: PlacementGroup | None = None
        self._reaper: Reaper

    @contextmanager
    def reserved(self) -> Iterator[Actors]:
        """Use the Ray that is already connected; otherwise start one on this machine and stop it at the end.

        Raises ``EngineError`` where there are not as many GPUs, or other work keeps them.
        """
        own = not ray.is_initialized()
        self._reaper = Reaper(own_session=own)
        try:
            if own:
                with _keeping(signal.SIGTERM):
                    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
            self.address = ray.util.get_node_ip_address()
            self._group = self._reserve()
            yield self
        finally:
            if own:
                ray.shutdown()
            elif self._group is not None:
                remove_placement_group(self._group)
            self._reaper.finish()

    def _reserve(self) -> PlacementGroup:
        if self._gpu and (there := ray.cluster_resources().get("GPU", 0.0)) < self._count:
            raise EngineError(f"gpus = {self._count}, but Ray sees {there:g}: lower gpus, or join a larger cluster")
        # On a CPU a pair needs nothing of its own: a trace of a processor gives it a place on one machine.
        group = placement_group([{"GPU": 1.0} if self._gpu else {"CPU": 0.01}] * self._count)
        if not group.wait(BUNDLES_SECONDS):
            free = ray.available_resources().get("GPU" if self._gpu else "CPU", 0.0)
            remove_placement_group(group)
            raise EngineError(
                f"{self._count} {'GPUs' if self._gpu else 'processors'} are wanted and {free:g} are free on the Ray "
                "cluster: wait for other work to end, or lower gpus"
            )
        return group

    def spawn(self, name: str, pair: int, imports: Sequence[str]) -> ActorCaller:
        """See ``Hosts``."""
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0.5 if self._gpu else 0}
        options |= {"max_restarts": 0, "max_task_retries": 0}
        options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(self._cpu_threads)}}
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, pair)
        return ActorCaller(ray.remote(_Host).options(**options).remote(), name, self._reaper, imports)


@contextmanager
def _keeping(number: signal.Signals) -> Iterator[None]:
    """Put our handler of a signal back: one of Ray's two exits at once, the other aborts three seconds later."""
    handler = signal.getsignal(number)
    yield
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)
        signal.siginterrupt(number, False)  # as asyncio had it


@dataclass(slots=True, frozen=True)
class Home:
    """Which process on which machine."""

    pid: int
    machine: str
    """The same for two processes exactly where they see each other's ids."""

    @classmethod
    def here(cls) -> Home:
        """This process's."""
        boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        known = boot.exists() and namespace.is_symlink()
        return cls(os.getpid(), f"{boot.read_text().strip()}/{namespace.readlink()}" if known else "")


class _Host:
    """What the actor's process runs. It builds its object in a call of its own: an exception from an actor's
    constructor would arrive as text only.
    """

    def __init__(self) -> None:
        self._target: Any = None

    def settle(self, imports: Sequence[str]) -> Home:
        """Import what will be needed; a module that is missing is reported by what needs it."""
        for name in imports:
            with suppress(ImportError):
                importlib.import_module(name)
        return Home.here()

    def make(self, make: Callable[[], Any]) -> None:
        """Make the object."""
        self._target = make()

    def close(self) -> None:
        """Close the object, if it was ever built."""
        if self._target is not None:
            self._target.close()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run one method of the object."""
        return getattr(self._target, method)(*args, **kwargs)

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        """Run one generator method of the object, to its end or until the caller has cancelled the call.

        Ray does not interrupt an actor: it only tells, so that it is asked after each item.
        """
        call = ray.get_runtime_context()
        with closing(getattr(self._target, method)(*args)) as items:
            for item in items:
                if call.is_canceled():
                    return
                yield item


class ActorCaller:
    """A ``Host`` over one Ray actor that lives and dies with it."""

    def __init__(self, actor: Any, name: str, reaper: Reaper, imports: Sequence[str]) -> None:
        self.name = name
        self.home: Home | None = None
        """Known once something was made."""
        self._actor = actor
        self._reaper = reaper
        self._settled = actor.settle.remote(imports)
        self._open = True

    async def make(self, make: Callable[[], Any]) -> None:
        """See ``Host``."""
        self.home = await self._result(self._settled)
        if self.home.machine == Home.here().machine:
            self._reaper.watch(self.home.pid)
        await self._result(self._actor.make.remote(make))

    async def alive(self) -> bool:
        """See ``Host``."""
        try:
            await self._result(self._actor.settle.remote(()))
        except ActorDied:
            return False
        return True

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See ``Caller``; our own errors arrive as they were raised, a dead process as ``ActorDied``."""
        return await self._result(self._actor.call.remote(method, *args, **kwargs))

    async def stream(self, method: str, *args: Any) -> AsyncGenerator[Any]:
        """See ``Caller``."""
        items = self._actor.stream.options(num_returns="streaming").remote(method, *args)
        try:
            async for reference in items:
                yield await self._result(reference)
        except BaseException:
            ray.cancel(items)
            raise

    async def close(self) -> None:
        """See ``Caller``."""
        if self._open:
            self._open = False
            process = process_of(self.home.pid) if self.home and self.home.machine == Home.here().machine else None
            if self.home:
                with suppress(RayError, TimeoutError):  # a dead or stuck process is only ended
                    await asyncio.wait_for(self._actor.close.remote(), CLOSE_SECONDS)
            ray.kill(self._actor)
            end = time.monotonic() + GONE_SECONDS
            while process is not None and is_alive(process) and time.monotonic() < end:
                await asyncio.sleep(0.01)

    async def _result(self, reference: Any) -> Any:
        try:
            return await reference
        except RayTaskError as error:
            if isinstance(error.cause, PosttrainError):
                raise error.cause from None
            raise
        except RayActorError as error:
            reason = str(error).strip().splitlines()[0]
            raise ActorDied(f"the {self.name}'s process died ({reason})", self.name) from None
