"""Where the sampler and the trainer live: both in this process around one copy of the base, or in two Ray actors a GPU.

Where vLLM samples on a GPU, its engine owns the base weights and the trainer maps them: the engine comes first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from posttrain.rl import machine
from posttrain.rl.claims import claimed
from posttrain.rl.errors import ActorDied
from posttrain.rl.service.blueprint import Blueprint
from posttrain.rl.service.groups import LearnerGroup, SamplerGroup
from posttrain.rl.service.handles import LearnerHandle, SamplerHandle, SamplerOutOfMemory, of_sampler

if TYPE_CHECKING:
    from posttrain.rl.config import Config
    from posttrain.rl.service.protocols import Learner, Sampler
    from posttrain.trainer.distributed import Rendezvous

T = TypeVar("T")

TRAINER_IMPORTS = ("torch", "transformers", "peft", "posttrain.trainer.trainer")
"""What a trainer's process imports while the engine starts."""


class Host(Protocol):
    """Somewhere an object can be built and called: a thread, or a Ray actor."""

    name: str

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See ``Caller``."""
        ...

    def stream(self, method: str, *args: Any) -> AsyncGenerator[Any]:
        """See ``Caller``."""
        ...

    async def make(self, make: Callable[[], Any]) -> None:
        """Build the object."""
        ...

    async def alive(self) -> bool:
        """Whether it still answers; waits for the call in flight."""
        ...

    async def close(self) -> None:
        """See ``Caller``; what it ran on is gone afterwards."""
        ...


class Hosts(Protocol):
    """Where hosts come from."""

    address: str
    """Of this machine, as the hosts reach it."""

    def spawn(self, name: str, pair: int, imports: Sequence[str]) -> Host:
        """Start a host for one object of a pair; it imports what it is going to need."""
        ...


class Placement:
    """A sampler and a trainer for each GPU, and how they are brought back."""

    sampler: Sampler
    """All samplers as one; another one after ``recover``."""
    learner: Learner
    """As ``sampler``."""

    def __init__(self, blueprint: Blueprint, hosts: Hosts) -> None:
        self._blueprint = blueprint
        self._hosts = hosts
        self._samplers: dict[int, Host] = {}
        self._trainers: dict[int, Host] = {}
        self._rendezvous: Rendezvous | None = None

    async def start(self) -> None:
        """Build every trainer, and the engines that are not there."""
        pairs = range(self._blueprint.config.gpus)
        missing = [pair for pair in pairs if pair not in self._samplers]
        self._samplers |= {pair: self._hosts.spawn(self._name("sampler", pair), pair, ()) for pair in missing}
        self._trainers = {pair: self._hosts.spawn(self._name("trainer", pair), pair, TRAINER_IMPORTS) for pair in pairs}
        self._meet(len(pairs))
        if self._blueprint.trainer_lends:
            await _each(self._make_trainer, pairs)
            await _each(self._make_sampler, missing)
        else:
            await _each(self._make_sampler, missing)
            await _each(self._make_trainer, pairs)
        samplers = [SamplerHandle(self._samplers[pair]) for pair in pairs]
        learners = [LearnerHandle(self._trainers[pair]) for pair in pairs]
        if len(pairs) > 1:
            self.sampler = SamplerGroup(samplers, self._blueprint.room.sequences)
            share = self._blueprint.config.trainer.share_prompts
            self.learner = LearnerGroup(learners, share_prompts=share)
        else:
            self.sampler, self.learner = samplers[0], learners[0]

    async def recover(self, error: ActorDied | SamplerOutOfMemory) -> None:
        """Rebuild what ``error`` has made useless; engines that live keep the base weights they have loaded.

        Trainers always start anew, all of them: they depend on one another, and on the weights of their engines. When
        a sampler ran out of memory, all engines start anew with half the room.
        """
        lost = set(self._samplers)
        if isinstance(error, SamplerOutOfMemory):
            self._blueprint = self._blueprint.halved()
        elif not self._blueprint.trainer_lends:
            lost = {pair for pair, host in self._samplers.items() if not await _serves(host, error)}
        await _each(_close, self._trainers.values())
        await _each(_close, [self._samplers.pop(pair) for pair in lost])
        await self.start()

    def remedy(self, error: ActorDied | SamplerOutOfMemory) -> str:
        """What ``recover`` is going to do."""
        if isinstance(error, SamplerOutOfMemory):
            before, after = self._blueprint.room, self._blueprint.room.halved()
            return f"sampler and trainer start again, with {after.describe()} in place of {before.describe()}"
        if error.actor.startswith("trainer") and not self._blueprint.trainer_lends:
            return "the trainer starts again beside the sampler that lives"
        return "sampler and trainer start again"

    async def close(self) -> None:
        """Close everything; trainers first, since they may hold the engines' weights."""
        await _each(_close, self._trainers.values())
        await _each(_close, self._samplers.values())

    def _meet(self, count: int) -> None:
        """Where several trainers find each other; a group that starts again needs another place."""
        if count > 1:
            from posttrain.trainer.distributed import Rendezvous

            self._rendezvous = Rendezvous(count, self._hosts.address)

    async def _make_sampler(self, pair: int) -> None:
        base = await self._trainers[pair]("base_weights") if self._blueprint.trainer_lends else None
        with of_sampler():
            await self._samplers[pair].make(self._blueprint.make_sampler(base))

    async def _make_trainer(self, pair: int) -> None:
        shared = await self._samplers[pair]("export_weights") if self._blueprint.engine_lends else None
        ranks = self._rendezvous.ranks[pair] if self._rendezvous else None
        try:
            await self._trainers[pair].make(self._blueprint.make_trainer(shared, ranks))
        except BaseException:
            if self._rendezvous:
                self._rendezvous.call_off()
            raise

    def _name(self, what: str, pair: int) -> str:
        return what if self._blueprint.config.gpus == 1 else f"{what} {pair}"


async def _serves(sampler: Host, error: ActorDied) -> bool:
    """Whether an engine is still of use after ``error``."""
    return sampler.name != error.actor and await sampler.alive()


async def _close(host: Host) -> None:
    await host.close()


async def _each(call: Callable[[T], Awaitable[None]], of: Iterable[T]) -> None:
    """For all at once; when all have ended, the failure that came first is raised."""
    failures: list[Exception] = []

    async def one(item: T) -> None:
        try:
            await call(item)
        except Exception as error:
            failures.append(error)

    await asyncio.gather(*map(one, of))
    if failures:
        raise failures[0]


@asynccontextmanager
async def place(config: Config, source: str, run: Path) -> AsyncIterator[Placement]:
    """Start sampler and trainer as ``config.placement`` says; both are closed on leaving, whatever happened.

    ``run``: the folder by which other runs on the same GPU name this one.
    """
    blueprint = Blueprint.of(config, source)
    gpus = machine.gpus()[: config.gpus] if blueprint.peak_bytes else []
    with claimed(gpus, blueprint.peak_bytes or 0, str(run)), _hosts(blueprint) as hosts:
        placement = Placement(blueprint, hosts)
        try:
            await placement.start()
            yield placement
        finally:
            await placement.close()


@contextmanager
def _hosts(blueprint: Blueprint) -> Iterator[Hosts]:
    """Actors on the pair's GPU, or threads of this process."""
    if blueprint.in_actors:
        from posttrain.rl.service.actors import Actors

        with Actors(blueprint.config.gpus, gpu=blueprint.gpu, cpu_threads=blueprint.threads).reserved() as actors:
            yield actors
    else:
        from posttrain.rl.service.local import Threads

        yield Threads(blueprint.threads)
