"""The example of combined rewards: what completions earn in it, by hand."""

from __future__ import annotations

import asyncio

import pytest

from posttrain.rl import config as configuration
from posttrain.rl.service.inputs import Given, gather
from posttrain.rl.types import Completion, Prompt

from .loading import EXAMPLES


@pytest.mark.parametrize(("step", "form"), [(1, 1.0), (4, 1.0 - 3 * 0.8 / 9), (10, 0.2), (40, 0.2)])
def test_completions_earn_what_the_file_says(step: int, form: float) -> None:
    """After 3 come 456. Half for close digits in three_digits' form, one for right ones; 5 tokens cost 1/4, 8 cost 1/2
    and not 1. The second has every digit in its place, and one too many.
    """
    rubric = gather(configuration.load(EXAMPLES / "rewards.toml"), Given(), EXAMPLES).rubric
    texts = {"456": 4, "4567": 5, "457": 4, "4567890": 8}
    completions = [Completion((1,) * tokens, (-1.0,) * tokens, text, "stop", 0) for text, tokens in texts.items()]
    [group] = asyncio.run(rubric.score([(Prompt("0-3", "3>", {"answer": "456"}), completions)], step=step))
    assert [r.rewards["close"] for r in group.rollouts] == pytest.approx([1, 1, 2 / 3, 1])
    assert [r.reward for r in group.rollouts] == pytest.approx([form + 1.5, -0.25, form + 1 / 3, -0.5])
