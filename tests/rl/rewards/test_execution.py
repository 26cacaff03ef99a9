"""What a failure costs: time limits, forgiven errors, batches asked again one by one, the cache, the limit on calls."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain import rl
from posttrain.rl.errors import ConfigError, RewardError
from posttrain.rl.metrics import Sum
from posttrain.rl.rewards import Rubric, metric, reward
from posttrain.rl.rewards.decorator import shortcut
from posttrain.rl.rewards.process_tree import children
from posttrain.rl.types import Completion, Prompt, Rollout, RolloutGroup
from tests.rl.service.tiny_runs import ROWS, settings, spread

TEXTS = ("a", "bb", "ccc", "dddd")


def group(texts: Sequence[str], **columns: Any) -> tuple[Prompt, list[Completion]]:
    return Prompt("0-0", "p", columns), [Completion((), (), text, "stop", 0) for text in texts]


def score(function: Callable[..., Any], texts: Sequence[str] = TEXTS, **columns: Any) -> RolloutGroup:
    """One group, scored by one function, whose processes end with it."""
    rubric = Rubric([function])
    try:
        [scored] = asyncio.run(rubric.score([group(texts, **columns)]))
    finally:
        rubric.close()
    return scored


def seen(scored: RolloutGroup) -> list[tuple[float | None, str | None]]:
    def one(rollout: Rollout) -> tuple[float | None, str | None]:
        [(name, value)] = rollout.rewards.items()
        return value, rollout.failures.get(name)

    return [one(rollout) for rollout in scored.rollouts]


SETTINGS: list[dict[str, Any]] = [{}, {"isolate": True}]
"""In the thread, and in a process."""


@pytest.mark.parametrize("settings", SETTINGS, ids=["thread", "process"])
def test_the_same_scores_in_the_thread_and_in_a_process(settings: dict[str, Any]) -> None:
    @reward(**settings)
    def length(completion: str, scale: float) -> float | None:
        return None if completion == "bb" else len(completion) * scale

    assert seen(score(length, scale=0.5)) == [(0.5, None), (None, None), (1.5, None), (2.0, None)]


@pytest.mark.parametrize("settings", SETTINGS, ids=["thread", "process"])
def test_an_exception_stops_the_run_and_names_function_and_sample(settings: dict[str, Any]) -> None:
    @reward(**settings)
    def picky(completion: str) -> float:
        return {"a": 1.0}[completion]

    with pytest.raises(RewardError, match=r"(?s)reward picky raised KeyError on .*'bb'.*called in posttrain style"):
        score(picky)


@pytest.mark.parametrize("settings", [*SETTINGS, {"asynchronous": True}], ids=["thread", "process", "coroutine"])
@pytest.mark.parametrize(("on_error", "value"), [("zero", 0.0), ("skip", None)])
def test_a_forgiven_exception_costs_its_sample(settings: dict[str, Any], on_error: Any, value: float | None) -> None:
    def picky(completion: str) -> float:
        return {"a": 1.0, "ccc": 3.0}[completion]

    async def waiting(completion: str) -> float:
        await asyncio.sleep(0)
        return picky(completion)

    settings = dict(settings)
    function = waiting if settings.pop("asynchronous", False) else picky
    scored = score(reward(on_error=on_error, **settings)(function))
    assert seen(scored) == [(1.0, None), (value, "error"), (3.0, None), (value, "error")]


@pytest.mark.parametrize("settings", SETTINGS, ids=["thread", "process"])
def test_a_result_that_is_no_score_follows_on_error_too(settings: dict[str, Any]) -> None:
    def wrong(completion: str) -> Any:
        return "good" if completion == "bb" else 1.0

    assert seen(score(reward(on_error="zero", **settings)(wrong))) == [(1.0, None), (0.0, "error")] + [(1.0, None)] * 2
    with pytest.raises(RewardError, match="wrong returned str 'good'"):
        score(reward(**settings)(wrong))


@pytest.mark.parametrize("on_error", ["raise", "zero", "skip"])
def test_time_that_ran_out_scores_zero_whatever_errors_mean(on_error: Any) -> None:
    @reward(timeout=0.5, on_error=on_error)
    def slow(completion: str) -> float:
        if completion == "bb":
            time.sleep(600)
        return 1.0

    @reward(timeout=0.3, on_error=on_error)
    async def slow_too(completion: str) -> float:
        if completion == "bb":
            await asyncio.sleep(600)
        return 1.0

    for function in (slow, slow_too):
        assert seen(score(function)) == [(1.0, None), (0.0, "timeout"), (1.0, None), (1.0, None)]


def test_a_function_that_raises_timeout_error_itself_has_a_bug() -> None:
    @reward(timeout=30.0)
    async def gives_up(completion: str) -> float:
        raise TimeoutError("the server")

    with pytest.raises(RewardError, match="gives_up raised TimeoutError"):
        score(gives_up)


@pytest.mark.parametrize("on_error", ["raise", "zero", "skip"])
def test_a_process_that_died_scores_zero_whatever_errors_mean(on_error: Any) -> None:
    @reward(isolate=True, on_error=on_error)
    def dies(completion: str) -> float:
        if completion == "bb":
            os._exit(1)
        return 1.0

    assert seen(score(dies)) == [(1.0, None), (0.0, "error"), (1.0, None), (1.0, None)]


def test_more_memory_than_allowed_costs_its_sample() -> None:
    @reward(memory_mib=256)
    def hungry(completion: str) -> float:
        return float(len(bytearray(len(completion) << 30)) >> 30) if completion == "dddd" else 1.0

    assert seen(score(hungry)) == [(1.0, None)] * 3 + [(0.0, "error")]


@pytest.mark.parametrize("failure", ["timeout", "error"])
def test_a_batch_that_failed_is_asked_again_sample_by_sample(failure: str, tmp_path: Path) -> None:
    @reward(style="trl", timeout=1.0)
    def lengths(completions: list[str], folder: list[str], **kwargs: Any) -> list[float]:
        with Path(folder[0], "calls").open("a") as file:
            file.write(f"{len(completions)}\n")
        if "bb" in completions:
            time.sleep(600) if failure == "timeout" else os._exit(1)
        return [float(len(text)) for text in completions]

    scored = score(lengths, folder=str(tmp_path))
    assert seen(scored) == [(1.0, None), (0.0, failure), (3.0, None), (4.0, None)]
    assert sorted((tmp_path / "calls").read_text().split()) == ["1", "1", "1", "1", "4"]


async def test_an_asynchronous_batch_that_ran_out_of_time_is_asked_again() -> None:
    calls: list[int] = []

    @reward(style="trl", timeout=0.3)
    async def lengths(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(len(completions))
        if "bb" in completions:
            await asyncio.sleep(600)
        return [float(len(text)) for text in completions]

    [scored] = await Rubric([lengths]).score([group(TEXTS)])
    assert seen(scored) == [(1.0, None), (0.0, "timeout"), (3.0, None), (4.0, None)] and calls == [4, 1, 1, 1, 1]


def test_failures_are_counted_by_kind() -> None:
    @reward(timeout=0.5)
    def fails(completion: str) -> float:
        if completion == "bb":
            time.sleep(600)
        if completion == "a":
            os._exit(1)
        return 1.0

    rubric = Rubric([fails])
    try:
        scored = asyncio.run(rubric.score([group(["a", "bb", "bb", "x"])]))
    finally:
        rubric.close()
    metrics = rubric.metrics(scored)
    assert metrics["reward/fails/timeouts"] == Sum(2) and metrics["reward/fails/errors"] == Sum(1)
    assert "reward/fails/timeouts" not in rubric.metrics([RolloutGroup(scored[0].prompt, scored[0].rollouts[3:])])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_cache_answers_equal_arguments_and_tries_failures_again(asynchronous: bool) -> None:
    calls: list[tuple[str, int]] = []

    def plain(completion: str, level: int) -> float:
        calls.append((completion, level))
        if completion == "bb" and len(calls) < 4:
            raise ValueError
        return float(len(completion) + level)

    async def waiting(completion: str, level: int) -> float:
        return plain(completion, level)

    rubric = Rubric([reward(cache=True, on_error="zero")(waiting if asynchronous else plain)])

    def once(level: int) -> list[tuple[float | None, str | None]]:
        return seen(asyncio.run(rubric.score([group(["a", "bb"], level=level)]))[0])

    assert once(0) == [(1.0, None), (0.0, "error")]
    assert once(0) == [(1.0, None), (0.0, "error")] and calls == [("a", 0), ("bb", 0), ("bb", 0)]
    assert once(0) == [(1.0, None), (2.0, None)] and calls[3:] == [("bb", 0)]
    assert once(0) == [(1.0, None), (2.0, None)] and len(calls) == 4
    assert once(5) == [(6.0, None), (7.0, None)] and calls[4:] == [("a", 5), ("bb", 5)]


async def test_no_more_calls_at_once_than_concurrency_says() -> None:
    under_way, most = 0, 0

    @reward(concurrency=3, timeout=0.4)
    async def counted(completion: str) -> float:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.15)
        under_way -= 1
        return 1.0

    # Four turns of 0.15 s: who waits for a turn does not use up its own time.
    [scored] = await Rubric([counted]).score([group(["x"] * 12)])
    assert most == 3 and seen(scored) == [(1.0, None)] * 12


def test_what_cannot_go_to_a_process_stops_the_run_even_where_errors_are_forgiven() -> None:
    lock = threading.Lock()

    @reward(isolate=True, on_error="zero")
    def holds(completion: str) -> float:
        return float(lock.locked())

    with pytest.raises(ConfigError, match="holds cannot be sent to a process"):
        score(holds)


@pytest.fixture
def answered() -> Iterator[Callable[..., float]]:
    @reward(isolate=True)
    def parent(completion: str, own: int) -> float:
        return float(os.getppid() != own)  # 1 in a worker, whose parent is the keeper

    @shortcut(parent)
    def quick(completion: str, own: int) -> float | None:
        return 0.25 if completion == "bb" else None

    yield parent


def test_a_shortcut_answers_here_and_leaves_the_rest_to_a_process(answered: Callable[..., float]) -> None:
    assert seen(score(answered, own=os.getppid())) == [(1.0, None), (0.25, None), (1.0, None), (1.0, None)]


def test_a_shortcut_is_not_asked_where_arguments_are_bound(answered: Callable[..., float]) -> None:
    bound = functools.update_wrapper(functools.partial(answered, own=os.getppid()), answered)
    del bound.__wrapped__  # type: ignore[attr-defined]
    assert seen(score(bound)) == [(1.0, None)] * 4


def test_close_ends_the_processes_and_the_next_call_starts_new_ones() -> None:
    @reward(isolate=True)
    def process(completion: str) -> float:
        return float(os.getpid())

    rubric = Rubric([process])
    first = asyncio.run(rubric.score([group(["x"])]))[0].rollouts[0].reward
    rubric.close()
    rubric.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)
    second = asyncio.run(rubric.score([group(["x"])]))[0].rollouts[0].reward
    rubric.close()
    assert first != second


def keepers() -> list[int]:
    return [pid for pid in children(os.getpid()) if b"pool_keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_run_counts_failures_and_ends_its_processes(tmp_path: Path) -> None:
    before = set(keepers())
    alive: list[int] = []

    @reward(isolate=True)
    def dies(completion: str, answer: str) -> float:
        os._exit(1)

    @reward(isolate=True)
    def spread_there(completion: str) -> float:
        return spread(completion)

    @metric
    def looks(completion: str) -> float:
        alive.extend(set(keepers()) - before)
        return 0.0

    result = rl.train(
        dataset=ROWS, rewards=[dies, spread_there, looks], output_dir=str(tmp_path), seed=1, **settings(steps=2)
    )
    row = result.metrics[-1]
    assert row["reward/dies/errors"] == 8 and row["reward/dies/mean"] == 0.0 and row["reward/spread_there/mean"] > 0
    assert alive and set(keepers()) <= before
