"""Signatures of AReaL: one sample a call, and ``completions`` is one text for all its name says."""

from __future__ import annotations

from posttrain.rl.rewards import reward
from tests.rl.rewards.conventions.case import CHAT, Case


@reward
def reward_fn(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **kwargs):
    """The documented form; the row's columns are keywords."""
    assert prompt == "What is 6 times 7?" and prompt_ids == [11, 12] and len(completion_ids) == len(completions)
    return float(completions.strip() == kwargs["answer"])


@reward
def gsm8k_reward_fn(prompt, completions, prompt_ids, completion_ids, answer, **kwargs) -> float:
    """As bundled: without annotations."""
    return float(str(completions).endswith(str(answer)))


@reward
def math_reward_fn(completions: str, answer: str) -> float:
    """As its agents have it."""
    return float(answer in completions)


@reward
async def counted_fn(prompt, completions, prompt_ids, completion_ids, **data) -> float:
    """An asynchronous one."""
    return completions.count(data["answer"])


TWO = ("42", "is 43")
ROW = {"answer": "42"}
CASES = [
    Case(reward_fn, "areal", TWO, [1.0, 0.0], ROW),
    Case(reward_fn, "areal", TWO, [1.0, 0.0], ROW, CHAT),
    Case(gsm8k_reward_fn, "areal", TWO, [1.0, 0.0], ROW),
    Case(math_reward_fn, "areal", TWO, [1.0, 0.0], ROW),
    Case(counted_fn, "areal", TWO, [1.0, 0.0], ROW),
]
