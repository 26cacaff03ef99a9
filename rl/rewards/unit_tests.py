"""Does the program pass its tests? Programs run in the sandbox; see ``README.md`` for what that holds against."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
import re
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from posttrain.rl.rewards import sandbox
from posttrain.rl.rewards.decorator import explains, factory, reward
from posttrain.rl.rewards.sandbox import Limits, Program, Result
from posttrain.rl.rewards.unit_tests_column import Case, Step, read_tests

_FENCE = re.compile(r"^[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)")
_LANGUAGES = ("python", "py", "python3")
IN_ALL = 6
"""Times ``timeout_s``: what the inputs of one sample may take together."""
_CHILD = Path(__file__).with_name("unit_tests_child.py")


@dataclass(slots=True, frozen=True)
class Verdict:
    """Of one program: how many tests it passed, and what the first other one said."""

    passed: int
    tests: int
    complaint: str = ""


@factory
def unit_tests(
    *,
    timeout_s: float = 5.0,
    memory_mib: int = 512,
    all_or_nothing: bool = True,
    tolerance: float = 0.0,
    require_isolation: bool = False,
    packages: bool = False,
) -> Callable[..., Awaitable[float]]:
    """A reward: 1 for a program that passes all its tests, or the share that it passes (``all_or_nothing=False``).

    Columns: ``tests`` (``unit_tests_column.py`` lists its forms) and, for HumanEval's, ``entry_point``. The program is
    the completion's last Python block, or all of it where it has none. ``timeout_s`` bounds one input's run, or all
    asserts together, and six times that everything one program is put through. Numbers in an output may differ by
    ``tolerance``, absolute or relative. Raises ``RewardError`` where ``require_isolation`` cannot be had.
    """
    for setting, value in (("timeout_s", timeout_s), ("memory_mib", memory_mib)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{setting} = {value}: a number above 0")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance = {tolerance}: 0 or a number above")
    if require_isolation:
        sandbox.require_strong()
    limits = Limits(timeout_s=timeout_s, memory_mib=memory_mib, packages=packages)

    def judge(completion: str, tests: object, entry_point: str | None, stop: threading.Event) -> Verdict:
        read, program = read_tests(tests, entry_point), extract_program(completion)
        trial = Trial(program, limits, time.monotonic() + IN_ALL * timeout_s, stop, all_or_nothing, tolerance)
        if isinstance(read[0], Case):
            return trial.cases([case for case in read if isinstance(case, Case)])
        return trial.steps([step for step in read if isinstance(step, Step)], entry_point)

    @reward(name="unit_tests")
    async def score(completion: str, tests: object, entry_point: str | None = None) -> float:
        stop = threading.Event()
        call = functools.partial(judge, completion, tests, entry_point, stop)
        try:
            verdict = await asyncio.get_running_loop().run_in_executor(sandbox.threads(), call)
        finally:
            stop.set()  # cancelled: the thread ends with the run under way
        share = verdict.passed / verdict.tests
        return float(share == 1) if all_or_nothing else share

    @explains(score)
    def explanation(completion: str, tests: object, entry_point: str | None = None) -> str:
        verdict = judge(completion, tests, entry_point, threading.Event())
        return f"{verdict.passed} of {verdict.tests} tests passed{verdict.complaint and ': '}{verdict.complaint}"

    return score


@dataclass(slots=True, frozen=True)
class Trial:
    """One program before its tests."""

    program: str
    limits: Limits
    deadline: float
    stop: threading.Event
    first_failure_ends: bool
    tolerance: float

    def cases(self, cases: Sequence[Case]) -> Verdict:
        """Each in a process of its own, which knows the input alone; outputs are compared here."""
        passed, complaint = 0, ""
        for number, case in enumerate(cases, 1):
            if (left := self.deadline - time.monotonic()) <= 0 or self.stop.is_set():
                complaint = complaint or f"out of time before test {number}"
                break
            limits = replace(self.limits, timeout_s=min(self.limits.timeout_s, left))
            result = sandbox.run(self.program, stdin=case.input, limits=limits)
            if result.succeeded and same_output(result.stdout, case.output, self.tolerance):
                passed += 1
                continue
            complaint = complaint or f"test {number}: {_cause(result, case.output)}"
            if self.first_failure_ends:
                complaint += "; the rest was not run" if number < len(cases) else ""
                break
        return Verdict(passed, len(cases), complaint)

    def steps(self, steps: Sequence[Step], entry_point: str | None) -> Verdict:
        """The tests in one sandbox, the program in another, joined by two pipes."""
        questions, answers = os.pipe(), os.pipe()
        tests_job = {"role": "tests", "read": answers[0], "write": questions[1], "entry_point": entry_point}
        tests_job["steps"] = [[step.source, step.counted] for step in steps]
        job = {"role": "program", "read": questions[0], "write": answers[1], "source": self.program}
        child = _CHILD.read_text()
        tester, tested = sandbox.run_together(
            [
                Program(child, json.dumps(tests_job), (answers[0], questions[1])),
                Program(child, json.dumps(job), (questions[0], answers[1])),
            ],
            limits=self.limits,
        )
        counted = {position: number for number, position in enumerate((p for p, s in enumerate(steps) if s.counted), 1)}
        passed, complaint, reached = 0, "", 0
        for line in tester.stdout.splitlines():
            position, error = json.loads(line)
            reached += position in counted
            passed += position in counted and error is None
            if error is not None and not complaint:
                what = (
                    f"test {counted[position]} ({steps[position].source.splitlines()[0][:80]})"
                    if position in counted
                    else "before a test"
                )
                complaint = error if position == "program" else f"{what}: {error.removesuffix(': ')}"
        if reached < len(counted) and not complaint:
            ended = next((result for result in (tester, tested) if result.killed), tester)
            complaint = f"test {reached + 1}: {_cause(ended)}"
        return Verdict(passed, len(counted), complaint)


def extract_program(completion: str) -> str:
    """The last fenced block that is marked as Python, else the last one without a mark, else the whole text.

    A block that is not closed goes to the end.
    """
    blocks: dict[bool, list[str]] = {}
    mark, marked, lines = "", False, list[str]()
    for line in completion.split("\n"):
        fence = _FENCE.match(line)
        if not mark and fence:
            mark, language, lines = fence["mark"], fence["language"].lower(), []
            kept, marked = language in ("", *_LANGUAGES), language != ""
            if kept:
                blocks[marked] = lines
        elif mark and line.strip().startswith(mark) and not line.strip().strip(mark[0]):
            mark = ""
        elif mark:
            lines.append(line)
    found = blocks.get(True, blocks.get(False))
    return completion if found is None else textwrap.dedent("\n".join(found))


def same_output(given: str, wanted: str, tolerance: float = 0.0) -> bool:
    """Equal line for line, whatever the blanks between words and the blank lines at the end."""
    left, right = ([line.split() for line in text.rstrip().split("\n")] for text in (given, wanted))
    return len(left) == len(right) and all(
        len(line) == len(other) and all(_same(word, twin, tolerance) for word, twin in zip(line, other, strict=True))
        for line, other in zip(left, right, strict=True)
    )


def _same(word: str, wanted: str, tolerance: float) -> bool:
    if word == wanted or not tolerance:
        return word == wanted
    try:
        return math.isclose(float(word), float(wanted), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False


def _cause(result: Result, wanted: str | None = None) -> str:
    """Why a run failed, in a line."""
    if result.killed is not None:
        return {"time": "out of time", "output": "prints too much"}.get(result.killed, f"too many {result.killed}")
    if result.status:
        return (result.stderr.strip().splitlines() or [f"exit status {result.status}"])[-1][:200]
    return "ended early" if wanted is None else f"printed {result.stdout[:80]!r} instead of {wanted[:80]!r}"
