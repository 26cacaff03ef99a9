"""reasoning-gym's problems as rows and its scorers as a reward; what may be evaluated, and what not."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.rl.config import DataConfig
from posttrain.rl.data import load_rows, make_prompts
from posttrain.rl.errors import ConfigError, DataError, RewardError
from posttrain.rl.rewards import Rubric, resolve
from posttrain.rl.rewards.decorator import explanation_of
from posttrain.rl.rewards.reasoning_gym import EVALUATED, EXPRESSIONS, LISTS, extract, is_harmless, reasoning_gym, rows
from posttrain.rl.types import Completion

CHAIN_SUM = {"source_dataset": "chain_sum"}


@pytest.mark.parametrize(
    ("completion", "where", "answer"),
    [
        ("so <answer> 4\n</answer> or <answer>5</answer>!", "tag", "5"),
        ("</answer> 4 <answer>", "tag", None),
        ("<answer>4", "tag", None),
        ("4", "tag", None),
        ("<answer>4</answer><answer>5", "tag", "4"),
        ("3 - 9 = -6.", "last_number", "-6"),
        ("1,234.50 or 1, 2,", "last_number", "2"),
        ("that is 1,234.50", "last_number", "1,234.50"),
        ("six", "last_number", None),
        ("first\nsecond \n", "last_line", "second"),
        (" all\nof it ", "reply", "all\nof it"),
        (" ", "reply", None),
        ("", "last_line", None),
    ],
)
def test_where_the_answer_stands(completion: str, where: Any, answer: str | None) -> None:
    assert extract(completion, where) == answer


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("The final answer is -6", 1.0),
        ("3 - 9 = -6.", 1.0),
        ("-6", 1.0),
        ("-6 is the answer to 3 - 9", 0.0),  # the last number counts
        ("6", 0.0),
        ("-60", 0.0),  # reasoning-gym: 2/3, since it contains -6
        ("minus six", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_number_of_a_chain_sum(completion: str, score: float) -> None:
    pytest.importorskip("reasoning_gym")
    strict = reasoning_gym(answer_in="last_number", partial=False)
    assert strict(completion=completion, answer="-6", metadata=CHAIN_SUM) == score


def test_the_tasks_own_score_in_part() -> None:
    pytest.importorskip("reasoning_gym")
    own = reasoning_gym(answer_in="last_number")
    assert own(completion="-60", answer="-6", metadata=CHAIN_SUM) == pytest.approx(2 / 3)
    explain = explanation_of(own)
    assert explain is not None
    assert explain(completion="-60", answer="-6", metadata=CHAIN_SUM) == "chain_sum gives '-60' 0.667"
    assert explain(completion="six", answer="-6", metadata=CHAIN_SUM) == "the reply has no last number"


@pytest.mark.parametrize("task", sorted({"countdown", "spiral_matrix", "basic_arithmetic", "puzzle24", "leg_counting"}))
def test_rows_and_reward_fit_each_other(task: str) -> None:
    pytest.importorskip("reasoning_gym")
    score = resolve("reasoning_gym", settings={"answer_in": "reply"})
    for row in rows(task, size=3, seed=5):
        columns = {name: row[name] for name in ("answer", "metadata", "task_settings")}
        assert score(completion=row["answer"], **columns) == 1.0
        assert score(completion="", **columns) == 0.0
        assert score(completion="blue", **columns) < 0.1


def test_the_scorer_has_the_settings_of_the_problems() -> None:
    """puzzle24 takes numbers up to 10 by itself; here they go up to 6."""
    pytest.importorskip("reasoning_gym")
    score = reasoning_gym(answer_in="reply")
    entry = {"answer": "", "metadata": {"source_dataset": "puzzle24"}}
    assert score(completion="8 * 3 * 1 * 1", **entry) == 1.0
    assert score(completion="8 * 3 * 1 * 1", **entry, task_settings={"max_value": 6}) == 0.01
    assert score(completion="6 * 4 * 1 * 1", **entry, task_settings={"max_value": 6}) == 1.0


def test_a_task_is_a_datasets_name(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    spec = "reasoning_gym:chain_sum?size=2000&seed=3&min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    found = load_rows(spec, DataConfig(), base=tmp_path)
    assert len(found) == 200  # ten by ten digits, plus and minus, each once
    prompts = make_prompts(found, DataConfig())
    rubric = Rubric([resolve("reasoning_gym", settings={"answer_in": "last_number"})])
    rubric.check(prompts[0].columns)
    replies = [Completion((1,), (-0.1,), text, "stop", 0) for text in (prompts[0].columns["answer"], "?")]
    try:
        [group] = asyncio.run(rubric.score([(prompts[0], replies)]))
    finally:
        rubric.close()
    assert [rollout.rewards for rollout in group.rollouts] == [{"reasoning_gym": 1.0}, {"reasoning_gym": 0.0}]
    assert [rollout.failures for rollout in group.rollouts] == [{}, {}]


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("reasoning_gym:chain_sun", "train", "has no task chain_sun: did you mean chain_sum"),
        ("reasoning_gym:", "train", "there are .*chain_sum"),
        ("reasoning_gym:chain_sum?terms=3", "train", "unexpected keyword argument 'terms'"),
        ("reasoning_gym:chain_sum?max_terms=1", "train", "max_terms"),
        ("reasoning_gym:chain_sum", "test", "no split test, .* data.eval_rows"),
    ],
)
def test_a_name_that_is_none(spec: str, split: str, message: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match=message):
        load_rows(spec, DataConfig(), split=split)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="answer_in is one of tag, last_number"):
        reasoning_gym(answer_in="middle")  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="metadata has no source_dataset"):
        reasoning_gym()(completion="<answer>4</answer>", answer="4", metadata={})
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match="pip install reasoning-gym"):
        rows("chain_sum")


@pytest.mark.parametrize(
    ("answer", "kind", "harmless"),
    [
        ("[[1, 0], [-1, 2]]", LISTS, True),
        ("['Q', '_', ('a',)]", LISTS, True),
        ("1 2 3\n4 5 6", LISTS, True),  # nothing that eval would take
        ("A B\0", LISTS, True),
        ("print('x')", LISTS, False),
        ("exit()", LISTS, False),
        ("[x for x in ().__class__.__bases__]", LISTS, False),
        ("[].append", LISTS, False),
        ("f'{1}'", LISTS, False),
        ("(lambda: 1)", LISTS, False),
        ("[1][0]", LISTS, False),
        ("1," * 1001, LISTS, False),  # too long
        ("(7 + 5) * 2 - 3/4", EXPRESSIONS, True),
        ("x**3*sin(2*x)/3 + log(abs(x)) + C", EXPRESSIONS, True),
        ("sin('x')", EXPRESSIONS, False),  # sympy evaluates strings
        ("'open(1)'", EXPRESSIONS, False),
        ("sympify(3)", EXPRESSIONS, False),
        ("x.diff(x)", EXPRESSIONS, False),
        ("sin(x)(y)", EXPRESSIONS, False),
        ("log(x, evaluate=0)", EXPRESSIONS, False),
        ("5! + 3", EXPRESSIONS, False),  # sympy reads more than can be checked
        ("(" * 1500, EXPRESSIONS, False),
        ("\ud800", EXPRESSIONS, False),
    ],
)
def test_only_lists_and_expressions_are_evaluated(answer: str, kind: str, harmless: bool) -> None:
    assert is_harmless(answer, kind) is harmless


@pytest.mark.parametrize("task", sorted(EVALUATED))
def test_an_answer_that_is_a_program_is_not_run(task: str, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    trace = tmp_path / "trace"
    [row] = rows(task, size=1)
    program = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    columns = {name: row[name] for name in ("answer", "metadata", "task_settings")}
    assert reasoning_gym(answer_in="reply")(completion=program, **columns) == 0.0
    assert not trace.exists()


def test_the_list_of_scorers_that_evaluate_is_whole() -> None:
    """Another release may bring others: their sources are searched for it."""
    package = pytest.importorskip("reasoning_gym")
    folder = Path(package.__file__).parent
    evaluating = {
        path.stem
        for path in folder.rglob("*.py")
        if any(call in path.read_text() for call in ("eval(answer)", "parse_expr(answer", "sympify(answer"))
    }
    assert evaluating - {"propositional_logic"} == set(EVALUATED)
