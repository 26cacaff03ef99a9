"""Signatures of Unsloth's GRPO notebooks: TRL's, on chat rows, reading ``completion[0]["content"]``."""

from __future__ import annotations

import re

from posttrain.rl.rewards import reward
from tests.rl.rewards.conventions.case import CHAT, Case

ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


@reward
def correctness_reward_func(prompts, completions, answer, **kwargs) -> list[float]:
    """Reads the last turn of a chat prompt too."""
    question = prompts[0][-1]["content"]
    assert question == "What is 6 times 7?"
    found = [ANSWER.search(completion[0]["content"]) for completion in completions]
    return [2.0 if match and match[1] == truth else 0.0 for match, truth in zip(found, answer, strict=True)]


@reward
def int_reward_func(completions, **kwargs) -> list[float]:
    """Half a point for digits in the tags."""
    contents = [completion[0]["content"] for completion in completions]
    return [0.5 if (match := ANSWER.search(text)) and match[1].isdigit() else 0.0 for text in contents]


@reward
def match_format_approximately(completions, **kwargs):
    """A loop that collects scores, points off for what is missing."""
    scores = []
    for completion in completions:
        score = 0
        response = completion[0]["content"]
        for tag in ("<answer>", "</answer>"):
            score += 0.5 if response.count(tag) == 1 else -1.0
        scores.append(score)
    return scores


@reward
def check_answer(prompts, completions, answer, **kwargs):
    """Tiers of points, as a number close to the answer earns some."""
    scores = []
    for completion, truth in zip(completions, answer, strict=True):
        match = ANSWER.search(completion[0]["content"])
        ratio = float(match[1]) / float(truth) if match else 0.0
        scores.append(5.0 if ratio == 1 else 2.0 if 0.9 <= ratio <= 1.1 else -2.5)
    return scores


FOUR = ("<answer>42</answer>", "<answer>45</answer>", "<answer>4.2", "42")
CASES = [
    Case(correctness_reward_func, "trl", FOUR, [2.0, 0.0, 0.0, 0.0], {"answer": "42"}, CHAT),
    Case(int_reward_func, "trl", FOUR, [0.5, 0.5, 0.0, 0.0], {}, CHAT),
    Case(match_format_approximately, "trl", FOUR, [1.0, 1.0, -0.5, -2.0], {}, CHAT),
    Case(check_answer, "trl", FOUR, [5.0, 2.0, -2.5, -2.5], {"answer": "42"}, CHAT),
]
