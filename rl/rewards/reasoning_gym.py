"""Tasks of the package reasoning-gym: their problems as rows, and their own scorers as a reward.

    data.dataset = "reasoning_gym:chain_sum?max_terms=3&size=4000"
    rewards = ["reasoning_gym"]

Scorers run in the pool of processes. Those of ``EVALUATED`` hand the answer to ``eval`` or to sympy, which is the same:
they are given lists, or expressions of numbers, names and a few functions, and never anything that could do more.
"""

from __future__ import annotations

import ast
import difflib
import functools
import json
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl

from posttrain.rl.errors import ConfigError, DataError, RewardError
from posttrain.rl.rewards.decorator import explains, factory, reward

PREFIX = "reasoning_gym:"
"""What a dataset's name begins with to be a task."""
TIMEOUT_S = 20.0
"""What one answer may take; it then scores 0. The first call of a process imports the package."""

Where = Literal["tag", "last_number", "last_line", "reply"]

LISTS, EXPRESSIONS = "lists", "expressions"
EVALUATED = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), LISTS),
    **dict.fromkeys(
        ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"),
        EXPRESSIONS,
    ),
}
"""Tasks of reasoning-gym 0.1.25 whose scorer evaluates the answer, and what answers look like."""
LONGEST_EVALUATED = 2000
"""Characters of an answer that is evaluated."""
FUNCTIONS = {
    "Abs",
    "abs",
    "acos",
    "asin",
    "atan",
    "cos",
    "cosh",
    "exp",
    "ln",
    "log",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
}
_NODES = (
    ast.Expression, ast.List, ast.Tuple, ast.Constant, ast.Name, ast.Load, ast.BinOp, ast.UnaryOp, ast.operator,
    ast.unaryop,
)  # fmt: skip


@factory
def reasoning_gym(
    *, answer_in: Where = "tag", partial: bool = True, name: str = "reasoning_gym"
) -> Callable[..., float]:
    """The task's own score of the answer.

    For rows as ``rows`` makes them: columns ``answer`` and ``metadata``, which names the task. The answer is what
    stands in the last ``<answer>…</answer>``, or the last number, the last line, or the whole reply; a reply without
    one scores 0, and so does one on which the scorer fails. ``partial = false``: only the full score of 1 counts.
    """
    if answer_in not in get_args(Where):
        raise ConfigError(f"answer_in = {answer_in!r}: answer_in is one of {', '.join(get_args(Where))}")

    def judged(
        completion: str, answer: object, metadata: Mapping[str, Any], settings: Mapping[str, Any] | None
    ) -> tuple[float, str]:
        """The score, and what there is to say about it."""
        task = _task_of(metadata)
        given = extract(completion, answer_in)
        if given is None:
            return 0.0, f"the reply has no {answer_in.replace('_', ' ')}"
        if task in EVALUATED and not is_harmless(given, EVALUATED[task]):
            return 0.0, f"{given[:60]!r} is none of the plain {EVALUATED[task]} that may be evaluated"
        scorer = _scorer(task, json.dumps(settings or {}, sort_keys=True))
        try:
            score = float(scorer(given, {"answer": answer, "metadata": metadata}))
        except Exception as error:  # whatever a scorer meets in a text that was never meant for it
            return 0.0, f"{task} cannot score {given[:60]!r}: {type(error).__name__}: {error}"
        return score, f"{task} gives {given[:60]!r} {score:.3g}"

    @reward(name=name, timeout=TIMEOUT_S)
    def task_score(
        completion: str, answer: object, metadata: Mapping[str, Any], task_settings: Mapping[str, Any] | None = None
    ) -> float:
        score, _ = judged(completion, answer, metadata, task_settings)
        return score if partial or score >= 1 else 0.0

    @explains(task_score)
    def explain(
        completion: str, answer: object, metadata: Mapping[str, Any], task_settings: Mapping[str, Any] | None = None
    ) -> str:
        return judged(completion, answer, metadata, task_settings)[1]

    return task_score


def rows(task: str, *, size: int = 1000, seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    """Different problems of a task: ``size`` are drawn, and each is kept once. ``settings`` are the task's own.

    Columns ``prompt``, ``answer`` (``None`` where many are right), ``metadata`` and ``task_settings``. Raises
    ``DataError`` for an unknown task, settings it does not take, or a package that is not installed.
    """
    _check_task(task)
    try:
        drawn = _package().create_dataset(task, seed=seed, size=size, **settings)
        entries = {entry["question"]: entry for entry in drawn}
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"reasoning_gym: task {task} with {settings or 'its own settings'}: {error}") from error
    return [
        {
            "prompt": question,
            "answer": entry["answer"],
            "metadata": {**entry["metadata"], "source_dataset": entry["metadata"].get("source_dataset", task)},
            "task_settings": settings,
        }
        for question, entry in entries.items()
    ]


def rows_of(spec: str, split: str = "train") -> list[dict[str, Any]]:
    """``rows`` by a dataset's name: ``reasoning_gym:task?size=4000&seed=1&setting=value``, values as in JSON."""
    if split != "train":
        raise DataError(f"{spec}: no split {split}, a generator has one: hold problems out by data.eval_rows")
    task, _, query = spec.removeprefix(PREFIX).partition("?")
    return rows(task, **{key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)})


def extract(completion: str, where: Where) -> str | None:
    """The answer that a reply gives, if it does."""
    if where == "reply":
        return completion.strip() or None
    if where == "last_line":
        return completion.strip().rpartition("\n")[2].strip() or None
    if where == "last_number":
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion)
        return numbers[-1].rstrip(",") if numbers else None
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    return completion[start + len("<answer>") : end].strip() if start >= 0 else None


def is_harmless(answer: str, kind: str) -> bool:
    """Whether evaluating an answer can do nothing but compute: no attributes, no subscripts, no calls but of functions
    of mathematics, and, since sympy evaluates strings, no strings in expressions.
    """
    if len(answer) > LONGEST_EVALUATED:
        return False
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return kind == LISTS  # eval refuses it, too; sympy reads more than Python
    return all(_is_plain(node, kind) for node in ast.walk(tree))


def _is_plain(node: ast.AST, kind: str) -> bool:
    if kind == EXPRESSIONS and isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
    if kind == EXPRESSIONS and isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    return isinstance(node, _NODES)


def _task_of(metadata: object) -> str:
    task = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
    if not isinstance(task, str):
        raise RewardError(
            "reasoning_gym: the row's column metadata has no source_dataset: take rows as reasoning-gym makes them "
            '(data.dataset = "reasoning_gym:task")'
        )
    return task


@functools.lru_cache(maxsize=128)
def _scorer(task: str, settings: str) -> Callable[[str, dict[str, Any]], float]:
    """The task's scorer, under the settings its problems were made with."""
    _check_task(task)
    scorer: Callable[[str, dict[str, Any]], float] = (
        _package().create_dataset(task, **json.loads(settings)).score_answer
    )
    return scorer


def _check_task(task: str) -> None:
    known = sorted(_package().factory.DATASETS)
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise DataError(f"reasoning_gym has no task {task}: {hint}")


def _package() -> ModuleType:
    try:
        import reasoning_gym as package  # type: ignore[import-untyped]
    except ImportError:
        raise DataError("tasks of reasoning-gym need the package: pip install reasoning-gym") from None
    module: ModuleType = package
    return module


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
