"""Whether a function reads its prompt and completion as messages or as text."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any


def as_messages(function: Callable[..., Any], key: str, annotation: object) -> bool | None:
    """Whether parameter ``key`` wants messages, by annotation, then by what the body does with it."""
    if annotation is not inspect.Parameter.empty:
        text = annotation_text(annotation).replace("typing.", "").replace("builtins.", "")
        chat = (
            "Message" in text or "dict" in text.lower() or (key in ("prompt", "completion") and "list" in text.lower())
        )
        if chat != ("str" in text.replace("dict[str", "").replace("Dict[str", "").replace("str, str", "")):
            return chat
    return True if _reads_turns(function, key) else None


def annotation_text(annotation: object) -> str:
    """An annotation as written; empty where there is none."""
    if annotation is inspect.Parameter.empty:
        return ""
    if isinstance(annotation, str):
        return annotation.strip("'\" ")
    return (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )


def unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function whose body runs: inside partials, bound methods and callable objects."""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not inspect.isroutine(inner) and not isinstance(inner, type):
        inner = type(inner).__call__
    inner = getattr(inner, "__func__", inner)
    return inspect.unwrap(inner)


def _reads_turns(function: Callable[..., Any], key: str) -> bool:
    """Whether the body subscripts (elements of) ``key`` with a string, which only messages allow."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(unwrapped(function))))
    except (OSError, TypeError, SyntaxError):
        return False  # no source (a console, a C function): the row decides, or text
    aliases = {key}
    for node in ast.walk(tree):
        aliases |= _bound_to_elements(node, aliases)
    return any(_root(part) in aliases for part in _string_reads(tree))


def _string_reads(tree: ast.AST) -> Iterator[ast.expr]:
    """The ``x`` of every ``x["…"]`` and ``x.get("…")``."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
        ):
            yield node.value
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            yield node.func.value


def _bound_to_elements(node: ast.AST, aliases: set[str]) -> set[str]:
    """Names that ``for x in key``, ``for x, y in zip(key, …)`` or ``x = key[-1]`` bind."""
    pairs: list[tuple[ast.expr, ast.expr]] = []
    if isinstance(node, ast.For | ast.comprehension):
        pairs.append((node.target, node.iter))
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.Name):
        pairs.extend((target, node.value) for target in node.targets)
    found: set[str] = set()
    for target, source in pairs:
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Name) and source.func.id == "zip":
            targets = target.elts if isinstance(target, ast.Tuple) else []
            pairs.extend(zip(targets, source.args, strict=False))
        elif isinstance(target, ast.Name) and _root(source) in aliases:
            found.add(target.id)
    return found


def _root(expression: ast.expr) -> str | None:
    """``completion`` of ``completion[-1][0]``."""
    while isinstance(expression, ast.Subscript):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else None
