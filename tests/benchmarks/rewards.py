"""Rewards at load: what the registry costs a sample, what faults cost, and what hostile functions cost.

    python tests/benchmarks/rewards.py [--only overhead load hostile] [--completions 10000] [--profile]

``overhead``: a function that returns 1, by how it is called. ``load``: completions in groups of 8 through the loop's
own scoring (64 groups at once) with ``math_answer``, ``xml_tags`` and a ``judge`` at an endpoint on this machine that
hangs for 2 % of the completions, crashes for 2 % (drops the connection or answers 500) and is malformed for 1 %; of
each half always, half at the first request. Every score is checked. ``hostile``: see ``hostile_rewards.py``. About two
minutes on two cores; needs the extra ``math``.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import multiprocessing
import os
import pstats
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hostile_rewards import hostile
from report import emit, records, tables

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: it has folders named as packages are

from posttrain.rl.rewards import Rubric, resolve, reward
from posttrain.rl.rewards.process_tree import descendants
from posttrain.rl.rewards.sample import Sample
from posttrain.rl.service.scoring import Draws
from posttrain.rl.timeline import Timeline
from posttrain.rl.types import Completion, Prompt, RolloutGroup, SamplingParams
from tests.rl.rewards.fake_endpoint import FakeEndpoint, Reply, Request

GROUP = 8
PARTS = ("overhead", "load", "hostile")
TARGETS = {
    "overhead.us_per_sample": "< 20",
    "load.wrong": "0",
    "load.processes_left": "0",
    "hostile.cost": "1 sample",
    "hostile.processes_left": "0",
}
LATENCY_S = 0.02
SHARES = {"hangs": 0.02, "crashes": 0.02, "malformed": 0.01}
JUDGE = {"request_timeout": 4.0, "timeout": 10.0, "retries": 2, "concurrency": 256, "scale": [0, 10]}
FAULTS = {
    "hangs": [Reply(delay_s=3600)],
    "crashes": [Reply(drop=True), Reply(status=500, body="crashed")],
    "malformed": [Reply("I cannot say."), Reply(body='{"choices": ['), Reply('{"score": 11}')],
}


# Overhead


def one(completion: str) -> float:
    return 1.0


def one_with_column(completion: str, answer: str) -> float:
    return 1.0


def ones(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


async def one_async(completion: str) -> float:
    return 1.0


@reward(cache=True)
def one_cached(completion: str) -> float:
    return 1.0


@reward(isolate=True)
def one_isolated(completion: str) -> float:
    return 1.0


def overhead(completions: int, profile: bool) -> None:
    """Microseconds of ``Rubric.score`` a sample: all in one call, and each group in a call of its own."""
    cases: list[tuple[Callable[..., Any], int]] = [
        (one, completions),
        (one_with_column, completions),
        (ones, completions),
        (one_async, completions),
        (one_cached, completions),
        (one_isolated, completions // 10),
    ]
    for function, count in cases:
        groups = [
            (Prompt(f"p{index}", "2+2?", {"answer": "4"}), [drawn(f"{index} {place}") for place in range(GROUP)])
            for index in range(count // GROUP)
        ]
        rubric = Rubric([function])
        asyncio.run(rubric.score(groups[:2]))
        whole = min(timed(rubric.score(groups)) for _ in range(5))
        single = min(timed(one_by_one(rubric, groups)) for _ in range(3))
        if profile and function is one:
            profiled(rubric, groups)
        rubric.close()
        samples = len(groups) * GROUP
        emit(
            "overhead",
            function.__name__,
            us_per_sample=1e6 * whole / samples,
            us_per_sample_group_by_group=1e6 * single / samples,
        )


async def one_by_one(rubric: Rubric, groups: Sequence[tuple[Prompt, list[Completion]]]) -> None:
    for group in groups:
        await rubric.score([group])


def timed(work: Any) -> float:
    """Seconds of a coroutine in an event loop of its own, without starting the loop."""

    async def run() -> float:
        began = time.perf_counter()
        await work
        return time.perf_counter() - began

    return asyncio.run(run())


def profiled(rubric: Rubric, groups: Sequence[tuple[Prompt, list[Completion]]]) -> None:
    """Where the time goes, in this thread and in the worker's."""
    profile = cProfile.Profile()
    inner = rubric._rewards[0]
    profile.enable()
    asyncio.run(rubric.score(groups))
    profile.disable()
    print("the event loop's thread:")
    pstats.Stats(profile).sort_stats("tottime").print_stats(8)
    samples = [
        Sample(prompt, completion, index, 0)
        for prompt, completions in groups
        for index, completion in enumerate(completions)
    ]
    profile = cProfile.Profile()
    profile.runcall(inner.score_blocking, samples)
    print("the worker thread:")
    pstats.Stats(profile).sort_stats("tottime").print_stats(12)


# Load


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
        return str(self.group / 4) if self.group % 10 == 1 else str(self.group)

    @property
    def text(self) -> str:
        """In each group one is wrong, one is never closed."""
        wrong = self.number % 8 == 2
        given = rf"\frac{{{self.group + wrong}}}{{4}}" if self.group % 10 == 1 else f"{self.group + wrong:,}"
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
        before = set(descendants(os.getpid()))
        planned = plan(completions, faulty)
        with endpoint(completions, faulty) as (url, asked):
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


def measured(part: str, given: argparse.Namespace) -> str:
    """Run one part in a process of its own; what it printed, which is passed on as it comes."""
    command = [sys.executable, __file__, "--in-process", "--only", part, "--completions", str(given.completions)]
    lines = []
    with subprocess.Popen(command + ["--profile"] * given.profile, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--completions", type=int, default=10_000)
    parser.add_argument("--profile", action="store_true", help="where the overhead goes")
    parser.add_argument("--in-process", action="store_true", help="one part, without the table")
    given = parser.parse_args()
    if given.completions % GROUP:
        parser.error(f"--completions is a multiple of {GROUP}")
    if not given.in_process:
        print(tables(records("".join(measured(part, given) for part in given.only)), TARGETS))
    elif given.only[0] == "overhead":
        overhead(given.completions, given.profile)
    elif given.only[0] == "load":
        load(given.completions)
    else:
        hostile()


if __name__ == "__main__":
    main()
