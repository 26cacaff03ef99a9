"""Signatures of verifiers 0.1: functions of a ``Rubric``, for one rollout or for a group."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from posttrain.rl.rewards import metric, reward
from tests.rl.rewards.conventions.case import CHAT, TEXT, Case

if TYPE_CHECKING:
    import verifiers as vf


@reward
async def correct_answer(completion, answer) -> float:
    """The documentation's first example in shape."""
    response = completion[-1]["content"]
    return 1.0 if answer in response else 0.0


@reward
def from_everything(prompt, completion, answer, state, task, info) -> float:
    """Every argument the rubric knows; ``info`` may be written as JSON in the dataset."""
    assert state["prompt"] == prompt and state["completion"] == completion and state["answer"] == answer
    assert task == "arithmetic" and prompt[0].role == "system"
    return info["bonus"] * float(completion[-1].content == answer)


@metric
async def num_turns(state: vf.State) -> float:
    """A metric on the state alone."""
    return float(len(state["trajectory"]))


@reward
def truncated(state, **kwargs) -> float:
    """State and the rest as keywords, which hold the columns."""
    return -float(state["is_truncated"]) + kwargs["level"]


class AnswerTags:
    """Stands in for a parser, which a rubric hands to functions that name it."""

    def parse_answer(self, completion: list[dict[str, str]]) -> str:
        return completion[-1]["content"].partition("<answer>")[2].partition("</answer>")[0]


@reward
def parsed(parser, completion, answer, **kwargs) -> float:
    """A parser: bound with ``functools.partial``, there being no rubric to own it."""
    return 1.0 if parser.parse_answer(completion) == answer else 0.0


@reward
async def shortest_of_group(completions, states) -> list[float]:
    """A group function: plural names, a list back."""
    lengths = [len(completion[-1]["content"]) for completion in completions]
    assert [state["completion"] for state in states] == completions
    return [float(length == min(lengths)) for length in lengths]


@reward
def majority(completions, answers, infos, tasks) -> list[float]:
    """A group function on what the rows hold."""
    replies = [completion[-1]["content"] for completion in completions]
    assert tasks == ["default"] * len(replies)
    return [
        info["bonus"] * (reply == answer) * replies.count(reply) / len(replies)
        for reply, answer, info in zip(replies, answers, infos, strict=True)
    ]


@reward
async def contains_answer(task, state) -> float:
    """0.1.14's ``verifiers.v1``: the task is the row."""
    return float(task["answer"] in str(state.get("completion") or ""))


@reward
async def best_of_n(tasks, states) -> list[float]:
    """The same for a group."""
    right = [task["answer"] == state["completion"][-1].content for task, state in zip(tasks, states, strict=True)]
    return [float(one) / sum(right) for one in right]


ROW = {"answer": "42"}
JSON_INFO = {"task": "arithmetic", "info": '{"bonus": 0.5}'}
FOUR = ("42", "42", "43", "It is 42.")
TAGGED = ("<answer>42</answer>", "42")
CASES = [
    Case(correct_answer, "verifiers", FOUR, [1.0, 1.0, 0.0, 1.0], ROW, CHAT),
    Case(correct_answer, "verifiers", FOUR, [1.0, 1.0, 0.0, 1.0], ROW, TEXT),
    Case(from_everything, "verifiers", FOUR, [0.5, 0.5, 0.0, 0.0], ROW | JSON_INFO, CHAT),
    Case(num_turns, "verifiers", FOUR, [1.0] * 4, ROW, CHAT),
    Case(truncated, "verifiers", FOUR, [2.0] * 4, ROW | {"level": 2}, CHAT),
    Case(functools.partial(parsed, parser=AnswerTags()), "verifiers", TAGGED, [1.0, 0.0], ROW, CHAT),
    Case(shortest_of_group, "verifiers", FOUR, [1.0, 1.0, 1.0, 0.0], ROW, CHAT),
    Case(majority, "verifiers", FOUR, [1.0, 1.0, 0.0, 0.0], ROW | {"info": {"bonus": 2}}, CHAT),
    Case(contains_answer, "verifiers", FOUR, [1.0, 1.0, 0.0, 1.0], ROW, CHAT),
    Case(best_of_n, "verifiers", FOUR, [0.5, 0.5, 0.0, 0.0], ROW, CHAT),
]
