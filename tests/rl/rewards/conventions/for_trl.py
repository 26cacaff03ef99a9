"""Signatures of TRL's documentation (reward functions of GRPOTrainer) and of its ``trl.rewards``."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from posttrain.rl.rewards import reward
from tests.rl.rewards.conventions.case import CHAT, Case


@reward
def shorter_is_better(completions, **kwargs):
    """Text rows: completions are strings."""
    return [-float(len(completion)) for completion in completions]


@reward
def number_of_tokens(completion_ids, **kwargs):
    """Token ids alone."""
    return [float(len(ids)) for ids in completion_ids]


@reward
def ends_with_column(prompts, completions, ground_truth, **kwargs):
    """A column arrives as a list beside the prompts."""
    assert prompts == ["What is 6 times 7?"] * len(completions)
    return [1.0 if text.endswith(truth) else 0.0 for text, truth in zip(completions, ground_truth, strict=True)]


@reward
def tagged(completions: list[list[dict[str, str]]], **kwargs) -> list[float]:
    """Chat rows: completions are lists of one message."""
    pattern = re.compile(r"^<think>.*</think>.+$", re.DOTALL)
    return [1.0 if pattern.match(completion[0]["content"]) else 0.0 for completion in completions]


@reward
def only_for_maths(
    completions: list[list[dict[str, str]]],
    solution: list[str],
    task: list[str],
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    """``None`` where it does not apply, and the trainer's logging callbacks."""
    assert log_extra is None and log_metric is None
    contents = [completion[0]["content"] for completion in completions]
    return [
        float(truth in content) if kind == "math" else None
        for content, truth, kind in zip(contents, solution, task, strict=True)
    ]


@reward
def stricter_with_time(completions, trainer_state, **kwargs):
    """The trainer's state."""
    return [float(len(text) <= 8 - trainer_state.global_step) for text in completions]


@reward
async def remote_check(prompts, completions, answer, **kwargs):
    """An asynchronous function."""
    await asyncio.sleep(0)
    return [float(text == truth) for text, truth in zip(completions, answer, strict=True)]


class Repetition:
    """A callable object, as ``get_repetition_penalty_reward`` makes."""

    __name__ = "repetition"

    def __call__(self, completion_ids: list[list[int]], **kwargs) -> list[float]:
        return [len(set(ids)) / len(ids) - 1 for ids in completion_ids]


TWO = ("42", "It is 43")
CASES = [
    Case(shorter_is_better, "trl", TWO, [-2.0, -8.0], {}),
    Case(number_of_tokens, "trl", TWO, [3.0, 1.0], {}, completion_ids=[[5, 6, 7], [5]]),
    Case(ends_with_column, "trl", TWO, [1.0, 0.0], {"ground_truth": "42"}),
    Case(tagged, "trl", ("<think>6 · 7</think>42", "42"), [1.0, 0.0], {}, CHAT),
    Case(only_for_maths, "trl", TWO, [1.0, 0.0], {"solution": "42", "task": "math"}, CHAT),
    Case(only_for_maths, "trl", TWO, [None, None], {"solution": "42", "task": "code"}, CHAT),
    Case(stricter_with_time, "trl", TWO, [1.0, 0.0], {}),  # at step 3: at most 5 letters
    Case(remote_check, "trl", TWO, [1.0, 0.0], {"answer": "42"}),
    Case(reward(Repetition()), "trl", TWO, [-0.5, 0.0], {}, completion_ids=[[1, 1, 2, 2], [1, 2]]),
]
