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
import pstats
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from hostile_rewards import hostile
from report import emit, records, tables
from reward_load import GROUP, drawn, load

from posttrain.rl.rewards import Rubric, reward
from posttrain.rl.rewards.sample import Sample
from posttrain.rl.types import Completion, Prompt

PARTS = ("overhead", "load", "hostile")
TARGETS = {
    "overhead.us_per_sample": "< 20",
    "load.wrong": "0",
    "load.processes_left": "0",
    "hostile.cost": "1 sample",
    "hostile.processes_left": "0",
}


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


def timed(work: Coroutine[Any, Any, object]) -> float:
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
