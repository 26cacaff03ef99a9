"""Calls one reward function for the samples of a group: in a thread, as coroutines, or in the pool of processes.

A function that runs out of time, or whose process dies, costs the sample it was called for: that scores 0. So does an
exception, where ``on_error`` says so. A function that scores a whole batch in one call is called once more for each
sample by itself when the batch fails in one of these ways, so that the others keep their scores.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from posttrain.rl.errors import ConfigError, RewardError
from posttrain.rl.rewards.arguments import call_arguments
from posttrain.rl.rewards.decorator import STYLES, shortcut_of
from posttrain.rl.rewards.returned import scores
from posttrain.rl.rewards.sample import Sample
from posttrain.rl.rewards.signature import Signature

if TYPE_CHECKING:
    from posttrain.rl.rewards.pool import Pool

Failure = Literal["timeout", "error"]
DEFAULT_TIMEOUT_S = 60.0
"""Of a call in the pool that names no limit of its own."""
CACHED = 100_000
"""Scores that one function's cache holds."""


@dataclass(slots=True)
class Outcome:
    """What one function made of one sample."""

    score: float | None
    failure: Failure | None = None


@dataclass(slots=True)
class Reward:
    """One function with what its calls share: the cache, and a limit on those under way."""

    signature: Signature
    pool: Callable[[], Pool]
    _scores: OrderedDict[bytes, list[float | None]] = field(default_factory=OrderedDict)
    _rooms: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = field(default_factory=dict)

    @property
    def blocking(self) -> bool:
        """Whether it is called in the worker thread."""
        return not self.signature.is_async and not self.signature.tag.isolated

    def score_blocking(self, samples: Sequence[Sample]) -> list[Outcome]:
        """In this thread, one call after another."""
        return [outcome for part in self._parts(samples) for outcome in self._kept(part)]

    async def score(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Every call at once, as far as ``concurrency`` and the pool go; the first sample's error is the one raised."""
        calls = [asyncio.ensure_future(self._kept_async(part)) for part in self._parts(samples)]
        try:
            found = await asyncio.gather(*calls, return_exceptions=True)
        except BaseException:
            for call in calls:
                call.cancel()
            raise
        for part in found:
            if isinstance(part, BaseException):
                raise part
        return [outcome for part in found if not isinstance(part, BaseException) for outcome in part]

    def _parts(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        """What one call is given: everything, the samples of one prompt, or one sample."""
        if not self.signature.convention.batched:
            return [[sample] for sample in samples]
        if not self.signature.convention.one_group:
            return [samples]
        return [list(group) for _, group in itertools.groupby(samples, lambda sample: sample.prompt.id)]

    def _call(self, part: Sequence[Sample], arguments: dict[str, Any]) -> list[Outcome]:
        try:
            with Blame(self.signature, part):
                value = self.signature.function(**arguments)
            return self._checked(value, part)
        except RewardError as error:
            return self._forgiven(error, part)

    async def _awaited(self, part: Sequence[Sample], arguments: dict[str, Any]) -> list[Outcome]:
        return await (self._call_async if self.signature.is_async else self._call_isolated)(part, arguments)

    async def _call_async(self, part: Sequence[Sample], arguments: dict[str, Any]) -> list[Outcome]:
        try:
            async with self._room(), asyncio.timeout(self.signature.tag.timeout) as limit:
                with Blame(self.signature, part):
                    value = await self.signature.function(**arguments)
            return self._checked(value, part)
        except TimeoutError:
            assert limit.expired(), "Blame turns the function's own into a RewardError"
            return await self._alone(part, "timeout")
        except RewardError as error:
            return self._forgiven(error, part)

    def _room(self) -> asyncio.Semaphore:
        """Of the running event loop: a semaphore belongs to the loop it first waited in."""
        loop = asyncio.get_running_loop()
        if loop not in self._rooms:
            self._rooms = {known: room for known, room in self._rooms.items() if not known.is_closed()}
            self._rooms[loop] = asyncio.Semaphore(int(self.signature.tag.concurrency))
        return self._rooms[loop]

    async def _call_isolated(self, part: Sequence[Sample], arguments: dict[str, Any]) -> list[Outcome]:
        from posttrain.rl.rewards.pool import Crashed, Failed, TimedOut

        tag = self.signature.tag
        try:
            if (quick := shortcut_of(self.signature.function)) is not None:
                with Blame(self.signature, part):
                    value = quick(**arguments)
                if value is not None:
                    return self._checked(value, part)
            value = await self.pool().call(
                self.signature.function,
                arguments,
                timeout_s=tag.timeout or DEFAULT_TIMEOUT_S,
                memory_mib=tag.memory_mib,
            )
            return self._checked(value, part)
        except TimedOut:
            return await self._alone(part, "timeout")
        except Crashed:
            return await self._alone(part, "error")
        except Failed as error:
            return self._forgiven(Blame(self.signature, part).error(error.kind, error.message, error.trace), part)
        except RewardError as error:
            return self._forgiven(error, part)

    async def _alone(self, part: Sequence[Sample], failure: Failure) -> list[Outcome]:
        """A call that ended without an answer: the sample's, or one call more for each sample of a batch."""
        if len(part) == 1:
            return [Outcome(0.0, failure)]
        again = await asyncio.gather(
            *(self._awaited([sample], call_arguments(self.signature, [sample])) for sample in part)
        )
        return [outcome for outcomes in again for outcome in outcomes]

    def _forgiven(self, error: RewardError, part: Sequence[Sample]) -> list[Outcome]:
        if self.signature.tag.on_error == "raise":
            raise error
        return [Outcome(0.0 if self.signature.tag.on_error == "zero" else None, "error") for _ in part]

    def _checked(self, value: object, part: Sequence[Sample]) -> list[Outcome]:
        return [Outcome(score) for score in scores(self.signature, value, part)]

    def _kept(self, part: Sequence[Sample]) -> list[Outcome]:
        arguments = call_arguments(self.signature, part)
        key, known = self._recalled(part, arguments)
        return self._remembered(key, self._call(part, arguments)) if known is None else known

    async def _kept_async(self, part: Sequence[Sample]) -> list[Outcome]:
        arguments = call_arguments(self.signature, part)
        key, known = self._recalled(part, arguments)
        return self._remembered(key, await self._awaited(part, arguments)) if known is None else known

    def _recalled(
        self, part: Sequence[Sample], arguments: Mapping[str, Any]
    ) -> tuple[bytes | None, list[Outcome] | None]:
        """The cache's key, if there is a cache, and what it holds."""
        if not self.signature.tag.cache:
            return None, None
        key = self._key(part, arguments)
        kept = self._scores.get(key)
        return key, None if kept is None else [Outcome(score) for score in kept]

    def _key(self, part: Sequence[Sample], arguments: Mapping[str, Any]) -> bytes:
        try:
            return hashlib.blake2b(pickle.dumps(sorted(arguments.items())), digest_size=16).digest()
        except Exception as error:
            raise RewardError(
                f"reward {self.signature.name}: its arguments on {part[0].label} cannot be a cache's key ({error}): "
                "take cache=True off, or ask for fewer columns"
            ) from error

    def _remembered(self, key: bytes | None, outcomes: list[Outcome]) -> list[Outcome]:
        """``outcomes``, kept under ``key``; failures are tried again."""
        if key is not None and not any(outcome.failure for outcome in outcomes):
            self._scores[key] = [outcome.score for outcome in outcomes]
            while len(self._scores) > CACHED:
                self._scores.popitem(last=False)
        return outcomes


class Blame:
    """Turns whatever the user's function raises into a ``RewardError`` with the cause chained.

    A ``ConfigError`` stays one, and ``on_error`` does not forgive it: every other call would end the same way.
    """

    def __init__(self, signature: Signature, samples: Sequence[Sample]) -> None:
        self.signature = signature
        self.samples = samples

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, RewardError | ConfigError):
            raise self.error(type(error).__name__, str(error)) from error

    def error(self, kind: str, message: str, trace: str = "") -> RewardError:
        """What went wrong on which sample; ``trace`` is the text of a traceback in another process."""
        where = self.samples[0].label
        if len(self.samples) > 1:
            where = f"a batch of {len(self.samples)} samples, {where} to {self.samples[-1].label}"
        hint = ""
        if kind in ("TypeError", "KeyError", "IndexError", "AttributeError"):
            hint = f" (called in {self.signature.style} style; @reward(style=…) changes it: {', '.join(STYLES)})"
        return RewardError(
            f"reward {self.signature.name} raised {kind} on {where}: {message}{hint}{chr(10) if trace else ''}{trace}"
        )
