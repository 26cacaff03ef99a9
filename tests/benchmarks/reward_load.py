"""Completions through ``math_answer``, ``xml_tags`` and a judge whose endpoint has faults; every score is checked.

Run by ``rewards.py --only load``.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from report import emit

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: it has folders named as packages are

from posttrain.rl.rewards import Rubric, resolve
from posttrain.rl.rewards.process_tree import descendants
from posttrain.rl.service.scoring import Draws
from posttrain.rl.timeline import Timeline
from posttrain.rl.types import Completion, Prompt, RolloutGroup, SamplingParams
from tests.rl.rewards.fake_endpoint import FakeEndpoint, Reply, Request

GROUP = 8
LATENCY_S = 0.02
SHARES = {"hangs": 0.02, "crashes": 0.02, "malformed": 0.01}
JUDGE = {"request_timeout": 4.0, "timeout": 10.0, "retries": 2, "concurrency": 256, "scale": [0, 10]}
FAULTS = {
    "hangs": [Reply(delay_s=3600)],
    "crashes": [Reply(drop=True), Reply(status=500, body="crashed")],
    "malformed": [Reply("I cannot say."), Reply(body='{"choices": ['), Reply('{"score": 11}')],
}


@dataclass(slots=True)
class Planned:
    """What completion ``number`` says, and what it should earn."""

    number: int
    fate: str
    """Such as ``hangs always``, ``crashes once``; empty: answered as it should be."""

    @property
    def group(self) -> int:
        return self.number // GROUP

    @property
    def answer(self) -> str:
        """The group's; one group in ten needs math-verify."""
        return rf"\sqrt{{2}}+{self.group}" if self.group % 10 == 1 else str(self.group)

    @property
    def text(self) -> str:
        """In each group one is wrong, one is never closed."""
        value = self.group + (self.number % 8 == 2)
        given = rf"{value}+\sqrt{{2}}" if self.group % 10 == 1 else f"{value:,}"
        tail = "" if self.number % 8 == 5 else "</answer>"
        return rf"<think>about #{self.number}</think><answer>\boxed{{{given}}}{tail}"

    @property
    def scores(self) -> dict[str, float]:
        judged = 0.0 if self.fate.endswith("always") else self.number % 11 / 10
        return {"math_answer": float(self.number % 8 != 2), "xml_tags": float(self.number % 8 != 5), "judge": judged}

    @property
    def failures(self) -> dict[str, str]:
        kind, _, when = self.fate.partition(" ")
        return {"judge": "timeout" if kind == "hangs" else "error"} if when == "always" else {}


def plan(completions: int, faulty: bool) -> list[Planned]:
    """Numbers and fates; the same at every call."""
    shares = SHARES if faulty else {}
    fates = [
        f"{kind} {when}"
        for kind, share in shares.items()
        for when in ("always", "once")
        for _ in range(round(share * completions / 2))
    ]
    fates += [""] * (completions - len(fates))
    random.Random(0).shuffle(fates)
    return [Planned(number, fate) for number, fate in enumerate(fates)]


class Faulty:
    """The judge at the endpoint: scores by the completion's number, and has its fate."""

    def __init__(self, planned: Sequence[Planned]) -> None:
        self._plan = planned
        self._seen: set[int] = set()

    def __call__(self, request: Request) -> Reply:
        number = int(re.findall(r"#(\d+)<", request.text)[-1])
        kind, _, when = self._plan[number].fate.partition(" ")
        first = number not in self._seen
        self._seen.add(number)
        if kind and (first or when == "always"):
            return FAULTS[kind][number % len(FAULTS[kind])]
        return Reply(f'Considered. {{"score": {number % 11}}}', delay_s=LATENCY_S)


def serve(completions: int, faulty: bool, pipe: Connection) -> None:
    """A process of its own: it says its address, serves until told to stop, and says how much it was asked."""
    server = FakeEndpoint(Faulty(plan(completions, faulty)), keep=False)
    with server.open():
        pipe.send(server.base_url)
        pipe.recv()
        pipe.send((server.requested, server.connections, server.most_at_once))


class Handed:
    """In place of a sampler: completions that are there already."""

    def __init__(self, completions: Sequence[Sequence[Completion]]) -> None:
        self._completions = completions

    async def stream(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams
    ) -> AsyncIterator[tuple[int, list[Completion]]]:
        for index in range(len(prompts)):
            await asyncio.sleep(0)
            yield index, list(self._completions[index])


def drawn(text: str) -> Completion:
    return Completion((), (), text, "stop", 0)


async def scored(rubric: Rubric, planned: Sequence[Planned]) -> tuple[list[RolloutGroup], float, float]:
    """Groups, seconds, and the longest that the event loop was kept from its other work."""
    prompts = [Prompt(str(one.number), "How many?", {"answer": one.answer}) for one in planned[::GROUP]]
    completions = [
        [drawn(one.text) for one in planned[start : start + GROUP]] for start in range(0, len(planned), GROUP)
    ]
    lag = 0.0

    async def tick() -> None:
        nonlocal lag
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.005)
            lag = max(lag, time.perf_counter() - began - 0.005)

    ticking = asyncio.create_task(tick())
    began = time.perf_counter()
    draws = Draws(Handed(completions), rubric, GROUP, SamplingParams(max_tokens=1))  # type: ignore[arg-type]
    found = await draws.groups(prompts, Timeline())
    seconds = time.perf_counter() - began
    ticking.cancel()
    return found.groups, seconds, lag


def load(completions: int) -> None:
    """The whole plan at once; beside it the same without faults, and without the judge."""
    for case, faulty, judged in (("no judge", False, False), ("no faults", False, True), ("faults", True, True)):
        planned = plan(completions, faulty)
        with endpoint(completions, faulty) as (url, asked):
            before = set(descendants(os.getpid()))
            names = ["math_answer", "xml_tags"]
            functions = [resolve(name) for name in names]
            if judged:
                functions.append(resolve("judge", settings={"model": "fake", "base_url": url, **JUDGE}))
            rubric = Rubric(functions)
            cpu = time.process_time()
            groups, seconds, lag = asyncio.run(scored(rubric, planned))
            cpu = time.process_time() - cpu
            rubric.close()
            requests, connections, at_once = asked()
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        wrong = [
            (one, rollout.rewards, rollout.failures)
            for one, rollout in zip(planned, rollouts, strict=True)
            if rollout.rewards != {name: one.scores[name] for name in rollout.rewards}
            or rollout.failures != (one.failures if judged else {})
        ]
        for one, rewards, failures in wrong[:5]:
            print(f"wrong: {one} {one.text!r} {rewards} {failures}")
        counted = Counter(failure for rollout in rollouts for failure in rollout.failures.values())
        expected = Counter(failure for one in planned for failure in one.failures.values())
        emit(
            "load",
            case,
            samples=len(rollouts),
            seconds=seconds,
            samples_per_s=len(rollouts) / seconds,
            cpu_us_per_sample=1e6 * cpu / len(rollouts),
            wrong=len(wrong),
            timeouts=f"{counted['timeout']} of {expected['timeout']}",
            errors=f"{counted['error']} of {expected['error']}",
            requests=requests,
            connections=connections,
            at_once=at_once,
            longest_lag_ms=1e3 * lag,
            processes_left=len(set(descendants(os.getpid())) - before),
        )


@contextmanager
def endpoint(completions: int, faulty: bool) -> Iterator[tuple[str, Callable[[], tuple[int, int, int]]]]:
    """Address of the judge's endpoint, and what ends it and tells requests, connections and requests at once."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(completions, faulty, theirs), daemon=True)
    process.start()

    def asked() -> tuple[int, int, int]:
        ours.send("stop")
        counts: tuple[int, int, int] = ours.recv()
        return counts

    try:
        yield ours.recv(), asked
    finally:
        process.join(10)
        process.kill()
        process.join()
        process.close()
