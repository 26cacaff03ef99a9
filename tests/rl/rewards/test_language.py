"""Shares of letters, counted by hand; which language a sentence is in is py3langid's to say."""

from __future__ import annotations

import sys

import pytest

from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards import language as module
from posttrain.rl.rewards import resolve
from posttrain.rl.rewards.decorator import explanation_of, tag_of
from posttrain.rl.rewards.language import language, prose

GERMAN = "Das Wetter ist heute sehr schön, und wir gehen in den Park. Morgen regnet es leider wieder den ganzen Tag."
ENGLISH = "The weather is lovely today, and we are going to the park. Tomorrow it will rain all day long, I am afraid."
FRENCH = (
    "Il fait très beau aujourd'hui, et nous allons au parc. Demain il va malheureusement pleuvoir toute la journée."
)


@pytest.mark.parametrize(
    ("wanted", "text", "share"),
    [
        ("Cyrillic", "да yes", 2 / 5),
        ("Latin", "да yes", 3 / 5),
        ("Latin", "1 + 1 = 2!", None),
        ("Latin", "", None),
        ("zh", "你好，世界 hello", 4 / 9),
        ("zh", "今日は天気がいい", 0.0),  # kana: Japanese
        ("ja", "今日は天気がいい", 1.0),
        ("ja", "今天天气很好", 0.0),  # none: Chinese
        ("ko", "안녕 abc", 2 / 5),
        ("el", "καλημέρα", 1.0),
        ("th", "สวัสดี hi", 4 / 6),  # four consonants; vowels and tones are marks, not letters
    ],
)
def test_scripts_that_need_no_library(
    wanted: str, text: str, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    score = language(wanted)(completion=text)
    assert score is None if share is None else score == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("so ```py\nx = 1``` it `is` 5", "so   it   5"),
        ("a $x + y$ b $$z$$ c", "a   b   c"),
        (r"a \(x\) b \[y\] c \alpha d", "a   b   c   d"),
        ("<think>a</think> <b class='x'>c</b> 1 < 2 > 1", " a   c  1 < 2 > 1"),
        ("see https://example.org/a?b=c now", "see   now"),
        ("costs $5 and\n$6", "costs $5 and\n$6"),
        ("```never closed", "```never closed"),
    ],
)
def test_code_formulas_tags_and_addresses_are_no_prose(text: str, left: str) -> None:
    assert prose(text) == left


@pytest.mark.parametrize(("wanted", "others"), [("de", ENGLISH + FRENCH), ("en", GERMAN + FRENCH), ("fr", ENGLISH)])
def test_languages_of_one_script(wanted: str, others: str) -> None:
    pytest.importorskip("py3langid")
    own = {"de": GERMAN, "en": ENGLISH, "fr": FRENCH}[wanted]
    assert language(wanted)(completion=own) == 1.0
    assert language(wanted)(completion=others) == 0.0


def test_a_reply_of_two_languages_counts_by_letters() -> None:
    pytest.importorskip("py3langid")
    letters = {text: sum(character.isalpha() for character in text) for text in (GERMAN, ENGLISH)}
    assert letters == {GERMAN: 84, ENGLISH: 82}
    mixed = language("de", among=["de", "en"])
    # two runs of sentences: GERMAN is one, since its first sentence has fewer than 60 letters
    assert mixed(completion=GERMAN + "\n" + ENGLISH) == pytest.approx(84 / (84 + 82))


def test_a_foreign_word_counts_for_itself_only() -> None:
    pytest.importorskip("py3langid")
    assert language("en")(completion="The answer is $x$, 你好, 42") == pytest.approx(11 / 13)
    assert language("ru")(completion="The answer is yes") == 0.0
    assert language("uk")(completion="Привіт, як справи сьогодні?") == 1.0
    assert language("ru")(completion="Привіт, як справи сьогодні?") == 0.0


def test_it_says_how_many_letters() -> None:
    share = resolve("language", settings={"wanted": "Cyrillic", "name": "script"})
    explain = explanation_of(share)
    assert tag_of(share).name == "script"
    assert explain is not None and explain(completion="да yes") == "2 of 5 letters are Cyrillic"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wanted": "Klingon"}, "no Unicode script has this name"),
        ({"wanted": "Latin}"}, "no Unicode script has this name"),
        ({"wanted": "xx"}, "'xx' is no language that can be told: .* de .* zh "),
        ({"wanted": "de", "among": ["de", "xx"]}, "'xx' is no language"),
        ({"wanted": "de", "among": ["en", "fr"]}, "without the wanted de"),
    ],
)
def test_what_is_no_language_is_refused(settings: dict[str, object], message: str) -> None:
    pytest.importorskip("py3langid")
    with pytest.raises(ConfigError, match=message):
        language(**settings)  # type: ignore[arg-type]


def test_without_py3langid_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    module._identifier.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install \"posttrain\[language\]\""):
        resolve("language", settings={"wanted": "de"})
