"""Format rewards on good, near-miss and arbitrary text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rl.rewards.text_format import ends_with_answer, exact, regex_format, xml_tags


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [("4", "4", 1.0), (" 4\n", 4, 1.0), ("4.", "4", 0.0), ("44", "4", 0.0), ("", "", 1.0)],
)
def test_exact(completion: str, answer: object, score: float) -> None:
    assert exact(completion, answer) == score


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("so it is 4.", "4", 1.0),
        ("=4", "4", 1.0),
        ("it is 14", "4", 0.0),
        ("it is 4!", "4", 0.0),
        ("-4", "4", 1.0),
        ("4", "", 0.0),
        ("", "4", 0.0),
    ],
)
def test_ends_with_answer(completion: str, answer: object, score: float) -> None:
    assert ends_with_answer(completion, answer) == score


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>a\nb</think>\n<answer>4</answer>", 1.0),
        ("  <think></think><answer></answer>  ", 1.0),
        ("<think>a</think><answer>4</answer> and more", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a<think>b</think></think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_xml_tags(completion: str, score: float) -> None:
    assert xml_tags(completion) == score


def test_regex_format_matches_the_whole_completion() -> None:
    reward = regex_format(r"<answer>.*</answer>", name="answer_tag")
    assert reward.__name__ == "answer_tag"
    assert reward(" <answer>a\nb</answer> ") == 1.0
    assert reward("x <answer>a</answer>") == 0.0
    with pytest.raises(re.error):
        regex_format("(")


@given(text=st.text(), answer=st.one_of(st.text(), st.integers(), st.none(), st.floats()))
def test_any_text_gives_zero_or_one(text: str, answer: object) -> None:
    for score in (exact(text, answer), ends_with_answer(text, answer), xml_tags(text), regex_format("a.*")(text)):
        assert score in (0.0, 1.0)
