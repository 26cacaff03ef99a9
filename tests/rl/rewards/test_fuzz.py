"""No built-in raises or outstays its time, whatever a model writes.

Those that work in this process are called on texts that hypothesis makes up, and on a list of texts of up to 100,000
characters that are hard on parsers; the others are run on that list by a rubric, as in a run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.rl.rewards import BUILT_INS, Rubric, resolve
from posttrain.rl.rewards.decorator import explanation_of
from posttrain.rl.types import Completion, Prompt

from .fake_endpoint import FakeEndpoint, Reply
from .test_reward_model import three_labels  # noqa: F401  (a fixture: the folder of a tiny classifier)

LIMIT_S = 5.0
"""Of one call in this process; the slowest takes a fifth of a second alone on its core."""
LONGEST = 100_000

SETTINGS: dict[str, dict[str, Any]] = {
    "ends_with_answer": {},
    "exact": {},
    "judge": {"model": "m", "retries": 0},  # what its reply may hold is tested with it
    "json_schema": {
        "schema": {
            "type": ["object", "array", "integer"],
            "properties": {"a": {"type": "integer", "multipleOf": 0.01}, "b": {"$ref": "#"}},
            "items": {"$ref": "#"},
            "required": ["a"],
            "patternProperties": {"^x+$": {"maximum": 1}},
        },
        "partial": 0.5,
    },
    "language": {"wanted": "zh"},
    "length_penalty": {"target": 10, "budget": 100, "unit": "words"},
    "math_answer": {},
    "reasoning_gym": {"answer_in": "last_number"},
    "regex_format": {"pattern": r"\s*<think>((?!</?think>).)*</think>\s*<answer>(.*)</answer>\s*"},
    "repetition": {"unit": "characters"},
    "reward_model": {"device": "cpu", "label": "good", "max_length": 32},
    "soft_overlong": {"max_tokens": 100, "buffer": 20},
    "unit_tests": {"timeout_s": 1.0, "memory_mib": 256},
    "xml_tags": {"partial": True},
}
NEVER_END = {("math_answer", "a power")}
HERE = [
    "ends_with_answer",
    "exact",
    "json_schema",
    "language",
    "length_penalty",
    "regex_format",
    "repetition",
    "xml_tags",
]
"""Called on everything; the others start processes or models."""

COLUMNS: dict[str, Any] = {
    "answer": "-6",
    "metadata": {"source_dataset": "chain_sum"},
    "tests": [{"input": "1", "output": "1"}],
}

FRAGMENTS = [
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<",
        ">",
        "```",
        "```json\n",
        "```python\n",
        "\n",
        " ",
        "\t",
        "\r",
    ),
    *("{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ":", '{"a":', '"x":', "1e999", "-", "NaN", "null"),
    *(r"\boxed{", r"\frac{", r"\sqrt", r"\(", r"\)", r"\[", "$", "$$", "####", "^", "%", "/", "9", "0.", "1/0", "-6"),
    *("9^9^9^9", "10**10**10", "x", "a", "word ", "是", "か", "й", "\u0301", "\u202e", "\ufeff", "🙂", "ß", "İ", "٣"),
    *("\x00", "\ud800", "\udfff", "\x1b[2J", "http://", "import os\n", "while True: pass\n", "def f():\n", "`", "~~~"),
]

HOSTILE = {
    "empty": "",
    "nothing": "\x00" * LONGEST,
    "half characters": "\ud800" * LONGEST,
    "digits": "9" * LONGEST,
    "a power": "\\boxed{9^{9^{9^{9}}}}",
    "numbers": "1 " * (LONGEST // 2),
    "thousands": "1,000" * (LONGEST // 5),
    "one letter": "a" * LONGEST,
    "lists": "[" * LONGEST,
    "objects": '{"a":' * (LONGEST // 5),
    "a deep object": '{"b":' * 400 + "1" + "}" * 400,
    "brackets": "(" * LONGEST,
    "boxes": "\\boxed{" * (LONGEST // 7),
    "fractions": "\\boxed{" + "\\frac{1}{" * 5000 + "2" + "}" * 5001,
    "opened tags": "<think>" * (LONGEST // 7),
    "closed tags": "</answer>" * (LONGEST // 9),
    "pairs": "<think></think><answer></answer>" * (LONGEST // 32),
    "fences": "```" * (LONGEST // 3),
    "fenced lines": "```json\n" * (LONGEST // 8),
    "formulas": "\\(" * (LONGEST // 2),
    "dollars": "$" * (LONGEST - 1),
    "marks": "#" * LONGEST,
    "sentences": ". " * (LONGEST // 2),
    "lines": "\n" * LONGEST,
    "quotes": '"' * (LONGEST - 1),
    "a long number in JSON": '{"a": 1' + "0" * 4000 + ', "x": 1e999}',
    "accents": "e" + "\u0301" * (LONGEST - 1),
    "scripts": "是か안ไyй" * (LONGEST // 6),
    "a program": "```python\n" + "print(1)\n" * 10_000 + "```",
    "a loop": "```python\nwhile True: pass\n```",
}
assert max(map(len, HOSTILE.values())) <= LONGEST


def built(name: str, **more: Any) -> Any:
    if name == "language" and importlib.util.find_spec("py3langid") is not None:
        more = {"wanted": "de"}  # by identification
    return resolve(name, settings={**SETTINGS[name], **more})


@pytest.fixture(scope="module")
def functions() -> dict[str, Any]:
    found = {name: built(name) for name in HERE}
    for function in found.values():
        function(**arguments(function, "warm"))  # models and packages are loaded once, and that is not the text's time
    return found


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with FakeEndpoint(lambda _: Reply('{"score": 0.5}')).open() as opened:
        yield opened


def arguments(function: Any, text: str) -> dict[str, Any]:
    offered = {**COLUMNS, "completion": text}
    return {name: offered[name] for name in inspect.signature(function).parameters if name in offered}


def check(functions: dict[str, Any], text: str) -> None:
    for name, function in functions.items():
        began = time.perf_counter()
        score = function(**arguments(function, text))
        took = time.perf_counter() - began
        assert score is None or (isinstance(score, float) and -1.0 <= score <= 1.0), (name, score)
        assert took < LIMIT_S, f"{name} took {took:.1f} s"
        if (explain := explanation_of(function)) is not None:
            assert isinstance(explain(**arguments(explain, text)), str), name


def test_every_built_in_is_here() -> None:
    assert set(SETTINGS) == set(BUILT_INS)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pieces=st.lists(
        st.tuples(
            st.one_of(st.sampled_from(FRAGMENTS), st.text(st.characters(), max_size=8)),
            st.sampled_from([1, 1, 1, 2, 30, 2000]),
        ),
        max_size=12,
    )
)
def test_any_text_has_a_score(functions: dict[str, Any], pieces: list[tuple[str, int]]) -> None:
    check(functions, "".join(piece * times for piece, times in pieces)[:LONGEST])


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_text_has_a_score(functions: dict[str, Any], text: str) -> None:
    check(functions, text)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("json_schema", list(HOSTILE)),
        ("judge", list(HOSTILE)),
        ("math_answer", list(HOSTILE)),
        ("reasoning_gym", list(HOSTILE)),
        ("soft_overlong", list(HOSTILE)),
        ("reward_model", ["empty", "half characters", "digits", "lines", "scripts", "numbers"]),
        ("unit_tests", ["empty", "nothing", "half characters", "brackets", "a program", "a loop"]),
    ],
)
def test_in_a_run_nothing_fails(name: str, texts: list[str], request: pytest.FixtureRequest) -> None:
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    more = {
        "reward_model": lambda: {"model": request.getfixturevalue("three_labels")},
        "judge": lambda: {"base_url": request.getfixturevalue("endpoint").base_url},
    }.get(name, dict)
    rubric = Rubric([built(name, **more())])
    rubric.check(COLUMNS)
    completions = [Completion((1,) * len(HOSTILE[text]), (), HOSTILE[text], "stop", 0) for text in texts]
    try:
        [group] = asyncio.run(rubric.score([(Prompt("0-0", "3 - 9 =", COLUMNS), completions)]))
    finally:
        rubric.close()
    for text, rollout in zip(texts, group.rollouts, strict=True):
        score = rollout.rewards[name]
        assert score is not None and math.isfinite(score), text
        # math-verify may not end on what a model calls a number: that is a timeout, and never an error
        assert rollout.failures == ({"math_answer": "timeout"} if (name, text) in NEVER_END else {}), text
