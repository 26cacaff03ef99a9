"""Reads a dataset's column of tests: inputs with outputs, or Python code with asserts."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.rl.errors import RewardError

FORMS = (
    'a list of {"input": …, "output": …}, {"inputs": […], "outputs": […]}, a string of Python code with asserts, a '
    "check function or test_ functions, a list of such strings, or one of these as JSON"
)


@dataclass(slots=True, frozen=True)
class Case:
    """What the program reads, and what it must print."""

    input: str
    output: str


@dataclass(slots=True, frozen=True)
class Step:
    """Code of the tests, run in order; ``counted``: it is a test, and not what a test needs."""

    source: str
    counted: bool


def read_tests(tests: object, entry_point: str | None = None) -> list[Case] | list[Step]:
    """At least one test. ``entry_point`` names the function that a HumanEval ``check`` is given.

    Raises ``RewardError`` for anything else: a column is the user's, and a wrong one would score every program 0.
    """
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise _malformed(f"begins like JSON and is none ({error})") from None
    if isinstance(tests, str):
        return _script(tests, entry_point)
    if isinstance(tests, Mapping):
        return _columns(tests)
    if not isinstance(tests, Sequence) or isinstance(tests, bytes):
        raise _malformed(f"is {type(tests).__name__} {str(tests)[:60]!r}")
    if not tests:
        raise _malformed("is empty")
    if all(isinstance(test, str) for test in tests):
        return [Step(ast.unparse(_parsed(test)), counted=True) for test in tests]
    if all(isinstance(test, Mapping) for test in tests):
        return [case for test in tests for case in _columns(test)]
    raise _malformed(f"mixes {', '.join(sorted({type(test).__name__ for test in tests}))}")


def _columns(tests: Mapping[object, object]) -> list[Case]:
    """One case, or as many as both lists have."""
    if "fn_name" in tests or tests.get("testtype") == "functional":
        raise _malformed("calls a function by name (fn_name): write the calls as asserts")
    if "input" in tests and "output" in tests:
        return [Case(_text(tests["input"]), _text(tests["output"]))]
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or isinstance(inputs, str):
        raise _malformed(f"has keys {', '.join(map(str, tests)) or 'none'}")
    if not inputs or len(inputs) != len(outputs):
        raise _malformed(f"has {len(inputs)} inputs and {len(outputs)} outputs")
    return [Case(_text(given), _text(wanted)) for given, wanted in zip(inputs, outputs, strict=True)]


def _text(value: object) -> str:
    """Text, a number as text, or lines."""
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, Sequence) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    raise _malformed(f"has an input or output that is {type(value).__name__} {str(value)[:60]!r}: give text")


def _script(source: str, entry_point: str | None) -> list[Step]:
    """Statement by statement: asserts count, and calls of test functions, which are added where none is called."""
    body = _parsed(source).body
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    called = {name for node in body if (name := _called(node))}
    counted = [isinstance(node, ast.Assert) or _called(node).startswith(("check", "test")) for node in body]
    steps = [Step(ast.unparse(node), test) for node, test in zip(body, counted, strict=True)]
    steps += [Step(f"{name}()", counted=True) for name in functions if name.startswith("test") and name not in called]
    if "check" in functions and "check" not in called:
        if entry_point is None:
            raise _malformed("has a check function and no entry_point: add the column entry_point")
        steps.append(Step("check(candidate)", counted=True))
    if not any(step.counted for step in steps):
        raise _malformed("has no assert, no check function and no test_ function")
    return steps


def _called(node: ast.stmt) -> str:
    """Name of the function that a statement calls, if that is all it does."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
        return node.value.func.id
    return ""


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise _malformed(f"is not Python ({error}): {source[:80]!r}") from None


def _malformed(what: str) -> RewardError:
    return RewardError(f"unit_tests: column tests {what}; it is {FORMS}")
