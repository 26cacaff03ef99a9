"""The final answer found, compared as mathematics, and never an exception or a hang whatever the model wrote."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rl.rewards.math_answer import final_answer, math_answer
from posttrain.rl.rewards.math_verdict import MAX_CHARACTERS, Verdicts

module = importlib.import_module("posttrain.rl.rewards.math_answer")  # the package's attribute is the function


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{2} and a broken \boxed{3", "2"),
        ("5 apples\n#### 72\nbye 9", "72"),
        ("#### ", None),
        ("She has 3 bags of 1,234,567 beads.", "1,234,567"),
        ("points 1,2", "2"),
        ("it is 4/8", "4/8"),
        ("3-5", "5"),
        ("f(x) -5", "-5"),
        ("= -5.25.", "-5.25"),
        ("so .5", ".5"),
        ("none", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("The answer is 1,234.", "1234", 1.0),
        ("It costs $18.00", "18", 1.0),
        ("#### 72", "6 * 12\n#### 72", 1.0),
        ("72", 72, 1.0),
        ("0.1", "0.10000000000000000001", 0.0),
        ("-3", "3", 0.0),
        ("so 3", "13", 0.0),
        ("no number", "0", 0.0),
        (r"\boxed{\text{blue}}", r"\text{blue}", 1.0),
        ("٣", "3", 0.0),
        ("9" * 100, "9" * 100, 1.0),
        ("9" * 100, "8" * 100, 0.0),
    ],
)
def test_numbers_and_equal_text_need_no_math_verify(
    completion: str, answer: object, score: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_has_math_verify", lambda: False)
    assert math_answer(completion, answer) == score


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\frac12}", r"\frac{2}{4}", 1.0),
        ("it is 4/8", "1/2", 1.0),
        (r"\boxed{x+1}", "1+x", 1.0),
        (r"\boxed{(x-1)(x+1)}", "x^2-1", 1.0),
        (r"\boxed{x+2}", "1+x", 0.0),
        (r"\boxed{(1,2)}", "(2,1)", 0.0),
        (r"\boxed{\frac{1}{}}", r"\frac{1}{2}", 0.0),
        (r"\boxed{\sqrt{2}}", r"2^{1/2}", 1.0),
    ],
)
def test_expressions_through_math_verify(completion: str, answer: str, score: float) -> None:
    pytest.importorskip("math_verify")
    assert math_answer(completion, answer) == score


def test_works_in_a_worker_thread() -> None:
    pytest.importorskip("math_verify")
    results: list[float] = []
    thread = threading.Thread(target=lambda: results.append(math_answer(r"\boxed{\frac{3}{4}}", "0.75")))
    thread.start()
    thread.join()
    assert results == [1.0]


def test_without_math_verify_an_expression_that_differs_in_text_scores_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_math_verify", lambda: False)
    assert math_answer(r"\boxed{x+1}", "1+x") == 0.0


@pytest.fixture
def verdicts() -> Iterator[Verdicts]:
    pytest.importorskip("math_verify")
    process = Verdicts(timeout_s=1.0)
    yield process
    process.close()


def test_an_endless_expression_is_stopped_and_the_next_question_is_answered(verdicts: Verdicts) -> None:
    verdicts._timeout_s = 20.0
    assert verdicts.equal("x+1", "1+x")
    verdicts._timeout_s = 1.0
    assert not verdicts.equal("9^{9^{9^{9}}}", "7")
    assert verdicts._child is None, "the stuck process must be gone"
    verdicts._timeout_s = 20.0
    assert verdicts.equal("x+1", "1+x")


def test_a_process_that_died_is_replaced(verdicts: Verdicts) -> None:
    verdicts._timeout_s = 20.0
    assert verdicts.equal("x+1", "1+x")
    assert verdicts._child is not None
    verdicts._child.kill()
    verdicts._child.wait()
    assert not verdicts.equal("x+1", "1+x")
    assert verdicts.equal("x+1", "1+x")


def test_an_overlong_answer_is_not_even_asked(verdicts: Verdicts) -> None:
    assert not verdicts.equal("x" * (MAX_CHARACTERS + 1), "x")
    assert verdicts._child is None


def test_close_leaves_no_process_and_can_be_repeated(verdicts: Verdicts) -> None:
    verdicts._timeout_s = 20.0
    verdicts.equal("x", "x")
    child = verdicts._child
    assert child is not None and child.poll() is None
    verdicts.close()
    verdicts.close()
    assert child.poll() is not None
    if sys.platform == "linux":
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)


LATEX = st.lists(
    st.sampled_from(
        ["\\boxed{", "}", "{", "\\frac", "x", "1", ",", ".", "-", "^", "$", "####", "\n", "\\", "%", "/", "e"]
    )
).map("".join)


@settings(max_examples=300, deadline=None)
@given(completion=st.one_of(st.text(), LATEX), answer=st.one_of(st.text(), LATEX, st.integers(), st.none()))
def test_any_text_gives_zero_or_one(completion: str, answer: object) -> None:
    original = module._has_math_verify
    module._has_math_verify = lambda: False  # hundreds of sympy calls take too long
    try:
        assert math_answer(completion, answer) in (0.0, 1.0)
    finally:
        module._has_math_verify = original


@settings(max_examples=15, deadline=None)
@given(completion=LATEX)
def test_any_latex_gives_zero_or_one_through_math_verify(completion: str) -> None:
    pytest.importorskip("math_verify")
    assert math_answer(f"\\boxed{{{completion}}}", "x+y") in (0.0, 1.0)
