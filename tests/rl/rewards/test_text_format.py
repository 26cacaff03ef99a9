"""Format rewards on good, near-miss and hostile text."""

from __future__ import annotations

import logging
import time

import pytest

from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards import text_format
from posttrain.rl.rewards.decorator import explanation_of, tag_of
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
        ("<think>1 < 2 <b>so</b> ></think><answer>4</answer>", 1.0),
        ("<think>a</think><answer>4</answer> and more", 0.0),
        ("well <think>a</think><answer>4</answer>", 0.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a<think>b</think></think><answer>4</answer>", 0.0),
        ("<think>a<answer>4</answer></think>", 0.0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("<Think>a</Think><answer>4</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_xml_tags(completion: str, score: float) -> None:
    assert xml_tags()(completion) == score


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>a</think><answer>4</answer>", 1.0),
        ("<think>a</think> so <answer>4</answer>", 2 / 3),
        ("<answer>4</answer><think>a</think>", 2 / 3),
        ("<think>a</think>4", 1 / 3),
        ("<think>a</think><answer>4", 1 / 3),
        ("</think>a<think><answer>4</answer>", 1 / 3),
        ("<think>a</think><think>b</think><answer>4</answer>", 1 / 3),
        ("4", 0.0),
    ],
)
def test_xml_tags_in_part(completion: str, score: float) -> None:
    assert xml_tags(partial=True)(completion) == pytest.approx(score)


def test_tags_of_ones_own_and_one_that_the_prompt_opens() -> None:
    three = xml_tags(["plan", "x.y", "done"], name="form")
    assert tag_of(three).name == "form"
    assert three("<plan>p</plan>\n<x.y>q</x.y>\n<done></done>") == 1.0
    assert three("<plan>p</plan>\n<xzy>q</xzy>\n<done></done>") == 0.0  # the dot is a dot
    opened = xml_tags(opened=True)
    assert opened("first\n</think><answer>4</answer>") == 1.0
    assert opened("<think>first\n</think><answer>4</answer>") == 0.0


@pytest.mark.parametrize("tags", ["think", [], ["a", "a"], ["<a>"], ["a b"], [""], [1]])
def test_what_is_no_list_of_tags_is_refused(tags: object) -> None:
    with pytest.raises(ConfigError, match="tags"):
        xml_tags(tags)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completion", "why"),
    [
        ("<think>a</think><answer>4", "not opened once and closed once: answer"),
        ("<answer>4</answer><think>a</think>", "the tags do not follow each other as think, answer"),
        ("<think>a</think> so <answer>4</answer>", "there is text outside of the tags"),
        ("<think>a</think><answer>4</answer>", "the form is kept"),
    ],
)
def test_xml_tags_says_why(completion: str, why: str) -> None:
    explain = explanation_of(xml_tags())
    assert explain is not None and explain(completion=completion) == why


def test_regex_format_matches_the_whole_completion() -> None:
    matches = regex_format(r"<answer>.*</answer>", name="answer_tag")
    assert tag_of(matches).name == "answer_tag"
    assert matches(" <answer>a\nb</answer> ") == 1.0
    assert matches("x <answer>a</answer>") == 0.0
    assert regex_format(r"((?!no).)*(.)\2")("yess") == 1.0
    assert regex_format(r"((?!no).)*(.)\2")("no pass") == 0.0
    with pytest.raises(ConfigError, match=r"missing \)"):
        regex_format("(")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(a|aa)+$", "a" * 100_000 + "b"),
        (r"(x+x+)+y", "x" * 100_000),
        (r"(\w+\s?)+$", "a" * 100_000 + "!"),
        (r"^(([a-z])+.)+[A-Z]([a-z])+$", "a" * 100_000),
        (r"(?:(?=(a+))a)+b", "a" * 100_000),
    ],
)
def test_a_pattern_that_backtracks_without_end_scores_0_and_says_so_once(
    pattern: str, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(text_format, "MATCH_LIMIT_S", 0.1)
    matches = regex_format(pattern)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert matches(text) == matches(text) == 0.0
    assert time.monotonic() - began < 10  # without the limit: longer than the universe
    assert [record.getMessage().split(" after")[0] for record in caplog.records] == [
        f"reward regex_format: matching a text of {len(text)} characters was given up"
    ]
    explain = explanation_of(matches)
    assert explain is not None and explain(completion=text).startswith("given up after 0.1 s")
