"""Repetition by hand."""

from __future__ import annotations

import zlib

import pytest

from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards.decorator import explanation_of, tag_of
from posttrain.rl.rewards.repetition import compressible_share, repeated_share, repetition


@pytest.mark.parametrize(
    ("items", "n", "share"),
    [
        ("", 1, 0.0),
        ("aaa", 4, 0.0),  # not one 4-gram
        ("aaaa", 1, 3 / 4),
        ("aaaa", 2, 2 / 3),  # aa three times
        ("abab", 2, 1 / 3),  # ab ba ab
        ("abcd", 2, 0.0),
        (["to", "be", "or", "not", "to", "be"], 2, 1 / 5),  # to be | be or | or not | not to | to be
        ([7, 7, 8, 7, 7], 2, 1 / 4),  # 77 78 87 77
    ],
)
def test_repeated_share(items: str | list[object], n: int, share: float) -> None:
    assert repeated_share(items, n) == pytest.approx(share)  # type: ignore[arg-type]


def test_words_characters_and_tokens() -> None:
    assert repetition(2)(completion="to be\nor not  to be") == pytest.approx(-1 / 5)
    assert repetition()(completion="a b c d e") == 0.0
    assert repetition()(completion="a b c d a b c d") == pytest.approx(-1 / 5)  # abcd bcda cdab dabc abcd
    assert repetition(2, unit="characters")(completion="哈哈哈哈") == pytest.approx(-2 / 3)
    assert repetition(2, unit="tokens")(completion_ids=[7, 7, 8, 7, 7]) == pytest.approx(-1 / 4)


def test_a_share_may_be_free() -> None:
    # 2/3 of the bigrams are repetitions; from 1/3 on it counts, so half of the way to 1
    assert repetition(2, unit="characters", free=1 / 3)(completion="aaaa") == pytest.approx(-1 / 2)
    assert repetition(2, unit="characters", free=0.7)(completion="aaaa") == 0.0


def test_compression() -> None:
    text = "ha" * 500
    assert compressible_share(text) == 1 - len(zlib.compress(text.encode(), 9)) / 1000 > 0.95
    assert compressible_share("") == 0.0
    assert compressible_share("a") == 0.0  # zlib's frame makes it longer
    assert compressible_share("\ud800") == 0.0
    half = repetition(measure="compression", free=0.5)
    assert half(completion=text) == pytest.approx(-(compressible_share(text) - 0.5) / 0.5)
    assert half(completion="The quick brown fox jumps over the lazy dog while eight zebras wait.") == 0.0


def test_it_says_how_much() -> None:
    by_words, by_tokens = repetition(2, name="loops"), repetition(2, unit="tokens")
    assert tag_of(by_words).name == "loops"
    words, tokens = explanation_of(by_words), explanation_of(by_tokens)
    assert words is not None and words(completion="to be or not to be") == "20% of the 2-grams of words are repetitions"
    assert tokens is not None
    assert tokens(completion_ids=[7, 7, 8, 7, 7]) == "25% of the 2-grams of tokens are repetitions"
    squeezed = explanation_of(repetition(measure="compression"))
    assert squeezed is not None and squeezed(completion="a") == "0% can be compressed away"


@pytest.mark.parametrize(
    "settings", [{"n": 0}, {"n": 65}, {"free": 1.0}, {"free": -0.1}, {"unit": "lines"}, {"measure": "entropy"}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        repetition(**settings)  # type: ignore[arg-type]
