"""Length penalties by hand."""

from __future__ import annotations

import asyncio

import pytest

from posttrain.rl.algorithms.overlong import ramp
from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards import Rubric
from posttrain.rl.rewards.decorator import explanation_of, tag_of
from posttrain.rl.rewards.length import length_penalty, soft_overlong
from posttrain.rl.types import Completion, Prompt


@pytest.mark.parametrize(("amount", "share"), [(-1, 0.0), (10, 0.0), (11, 0.25), (13, 0.75), (14, 1.0), (99, 1.0)])
def test_ramp_from_10_to_14(amount: float, share: float) -> None:
    assert ramp(amount, 10, 14) == share


def test_a_ramp_without_length_is_a_step() -> None:
    assert [ramp(amount, 8, 8) for amount in (7, 8, 9)] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("tokens", "score"), [(0, 0.0), (100, 0.0), (150, -0.25), (200, -0.5), (300, -1.0), (900, -1.0)]
)
def test_linear_from_100_to_300_tokens(tokens: int, score: float) -> None:
    assert length_penalty(100, 300)(completion_ids=[7] * tokens) == pytest.approx(score)


@pytest.mark.parametrize(("words", "score"), [(4, 0.0), (5, -0.25), (5.5, -0.5), (6, -0.75), (7, -1.0), (50, -1.0)])
def test_half_a_cosine_from_4_to_7_words(words: float, score: float) -> None:
    # (1 − cos 60°) / 2 = 1/4, (1 − cos 120°) / 2 = 3/4; the middle is reached between two words
    if words == int(words):
        text = " \n".join(["word"] * int(words))
        assert length_penalty(4, 7, shape="cosine", unit="words")(completion=text) == pytest.approx(score)
    else:
        text = " ".join(["word"] * int(2 * words))
        assert length_penalty(8, 14, shape="cosine", unit="words")(completion=text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("tokens", "score"), [(16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (20481, -1.0)]
)
def test_soft_overlong_with_the_papers_numbers(tokens: int, score: float) -> None:
    """2503.14476, section 4.1: at most 20,480 tokens, of them a cache of 4,096."""
    assert soft_overlong(20480, 4096)(completion_ids=range(tokens)) == score


def test_soft_overlong_without_a_buffer_punishes_only_what_is_beyond() -> None:
    assert [soft_overlong(8, 0)(completion_ids=[1] * n) for n in (7, 8, 9)] == [0.0, 0.0, -1.0]


def test_the_loop_hands_over_the_tokens() -> None:
    rubric = Rubric([soft_overlong(8, 4, name="overlong")])
    rubric.check([])
    completions = [Completion((5,) * n, (-0.1,) * n, "x", "stop", 0) for n in (4, 5, 8)]
    [group] = asyncio.run(rubric.score([(Prompt("0-0", "say x", {}), completions)]))
    assert [rollout.rewards["overlong"] for rollout in group.rollouts] == [0.0, -0.25, -1.0]
    assert [rollout.reward for rollout in group.rollouts] == [0.0, -0.25, -1.0]


def test_they_say_how_long_it_is() -> None:
    by_words, by_tokens = length_penalty(1, 2, unit="words"), length_penalty(1, 2, name="short")
    assert tag_of(by_tokens).name == "short"
    explain_words, explain_tokens = explanation_of(by_words), explanation_of(by_tokens)
    assert explain_words is not None and explain_words(completion="one two three") == "3 words"
    assert explain_tokens is not None and explain_tokens(completion_ids=[1, 2]) == "2 tokens"
    assert "not known" in explain_tokens()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 5, "budget": 5}, "0 ≤ target < budget"),
        ({"target": -1, "budget": 5}, "0 ≤ target < budget"),
        ({"target": 1, "budget": 5, "shape": "square"}, "one of linear, cosine"),
        ({"target": 1, "budget": 5, "unit": "letters"}, "one of tokens, words"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        length_penalty(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("max_tokens", "buffer"), [(0, 0), (8, 9), (8, -1)])
def test_a_buffer_that_does_not_fit_is_refused(max_tokens: int, buffer: int) -> None:
    with pytest.raises(ConfigError, match="0 ≤ buffer ≤ max_tokens"):
        soft_overlong(max_tokens, buffer)
