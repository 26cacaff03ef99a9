"""Which calling convention a reward function follows, read from its signature.

| style | called | receives | returns |
|---|---|---|---|
| ``posttrain`` | once a sample | ``completion: str``, others of ``PER_SAMPLE``, columns | number or ``None`` |
| ``trl`` | once a batch | ``prompts``, ``completions``, ``completion_ids``, columns, each a list | a list of them |
| ``verifiers`` | once a sample | ``prompt``, ``completion`` (messages), ``state``, ``info``…, columns | number |

A batch is one group, the completions of one prompt: rewards work while other groups are still being sampled.

Chosen in this order:

1. ``style=`` of the decorator.
2. ``prompts`` or ``completions`` → ``trl``. So are ``completion_ids`` or columns alone where the return annotation is a
   list, and ``completion_ids`` beside ``**kwargs`` with no return annotation (TRL insists on ``**kwargs``).
3. ``completion: str`` → ``posttrain``. ``completion: Messages`` or any list → ``verifiers``.
4. ``completion`` without annotation: ``verifiers`` when ``state`` is asked for, or when the body reads it as messages
   (``completion[-1]["content"]``, a loop over turns); else ``posttrain``. A wrong guess fails loudly on the first call,
   since a string cannot be read as messages, and the error says which style was used.
5. No ``completion`` at all: ``posttrain``, provided one of its own names or a column is asked for.

Messages or text: an annotation decides, then the body as in 4, then the row (TRL and verifiers hand messages for chat
rows and strings for text rows).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards.decorator import RewardTag, Style, tag_of

PER_SAMPLE = ("prompt", "completion", "completion_ids", "finish_reason", "messages", "columns", "prompt_id", "step")
"""What a posttrain-style function may ask for beside columns. ``messages``: the prompt as turns and the reply."""
TRL_NAMES = ("prompts", "completions", "completion_ids", "trainer_state")
"""What TRL's trainer hands over; its ``log_extra``, ``log_metric`` and ``environments`` are left at their defaults."""
BATCH_STYLES: tuple[Style, ...] = ("group", "trl", "openrlhf")
"""Styles called once a group."""
VERIFIERS_NAMES = ("prompt", "completion", "state", "info", "task")


@dataclass(slots=True, frozen=True)
class Signature:
    """A reward function, ready to be called by name."""

    function: Callable[..., Any]
    name: str
    weight: float
    style: Style
    is_async: bool
    required: tuple[str, ...]
    """Parameters without a default."""
    optional: tuple[str, ...]
    """Parameters with one: filled where there is something to fill them with."""
    takes_all: bool
    """It has ``**kwargs``."""
    tag: RewardTag = field(default_factory=RewardTag)
    """What the decorator says of it."""
    as_messages: dict[str, bool | None] = field(default_factory=dict)
    """Prompt and completion parameters: messages, text, or (``None``) whichever the row is."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every named parameter."""
        return self.required + self.optional

    def provided(self) -> tuple[str, ...]:
        """Names this style fills without a column."""
        return {"posttrain": PER_SAMPLE, "trl": TRL_NAMES, "verifiers": VERIFIERS_NAMES}[self.style]

    def hidden(self, columns: Collection[str]) -> list[str]:
        """Asked-for names that a column has too, where it is open which of the two is meant."""
        clear = {"prompt", "prompts", "completion", "completions", "info", "task"}
        return [name for name in self.names if name in self.provided() and name in columns and name not in clear]

    def missing(self, columns: Collection[str]) -> list[str]:
        """Required parameters that neither the style nor the dataset provides."""
        return [name for name in self.required if name not in self.provided() and name not in columns]


def read(function: Callable[..., Any]) -> Signature:
    """Choose the style of ``function``; raises ``RewardError`` saying what to do where none fits."""
    if not callable(function):
        raise RewardError(f"a reward is a function, not {function!r}")
    tag = tag_of(function)
    name = function_name(function) if tag.name is None else tag.name
    try:
        parameters = inspect.signature(function, eval_str=False).parameters
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {name}: its signature cannot be read ({error}); wrap it in a def") from None
    named = {key: value for key, value in parameters.items() if value.kind not in _VARIADIC}
    for key, value in parameters.items():
        if value.kind is value.POSITIONAL_ONLY and value.default is value.empty:
            raise RewardError(
                f"reward {name}: {key} is positional-only, and arguments are passed by name; remove the /"
            )
    takes_all = any(value.kind is value.VAR_KEYWORD for value in parameters.values())
    turns = {key: _as_messages(function, key, value.annotation) for key, value in named.items() if key in _SPEECH}
    style = tag.style or _choose(name, named, takes_all, _return_annotation(function), turns)
    return Signature(
        function=function,
        name=name,
        weight=tag.weight,
        style=style,
        is_async=_is_async(function),
        required=tuple(key for key, value in named.items() if value.default is value.empty),
        optional=tuple(key for key, value in named.items() if value.default is not value.empty),
        takes_all=takes_all,
        tag=tag,
        as_messages=turns,
    )


_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
_SPEECH = ("prompt", "prompts", "completion", "completions")


def function_name(function: Callable[..., Any]) -> str:
    """Name for metrics and messages: the function's, the wrapped function's, or the class's."""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    return str(getattr(inner, "__name__", type(inner).__name__))


def unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function whose body runs: inside partials, bound methods and callable objects."""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not inspect.isroutine(inner) and not isinstance(inner, type):
        inner = type(inner).__call__
    inner = getattr(inner, "__func__", inner)
    return inspect.unwrap(inner)


def _is_async(function: Callable[..., Any]) -> bool:
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def _return_annotation(function: Callable[..., Any]) -> str:
    annotation = inspect.signature(function).return_annotation
    return "" if annotation is inspect.Signature.empty else _text(annotation)


def _choose(
    name: str,
    named: dict[str, inspect.Parameter],
    takes_all: bool,
    returns: str,
    turns: dict[str, bool | None],
) -> Style:
    """Steps 2 to 5 of the module's rules."""
    plural = [key for key in ("prompts", "completions") if key in named]
    singular = [key for key in ("prompt", "completion") if key in named]
    if plural and singular:
        raise RewardError(
            f"reward {name}: asks for {plural[0]} (TRL, once a batch) and for {singular[0]} (once a sample); "
            "keep one of them, or say @reward(style=…)"
        )
    if plural:
        return "trl"
    returns_list = returns.startswith(("list", "List", "Sequence", "typing.List", "tuple"))
    if not singular:
        if returns_list and (takes_all or "completion_ids" in named):
            return "trl"
        if "completion_ids" in named and takes_all and not returns:
            return "trl"
        if takes_all and not set(named) & set(PER_SAMPLE):
            raise RewardError(
                f"reward {name}: only **kwargs and columns, so it is open whether it scores one sample or a batch; "
                "name completion (one) or completions (a batch), or say @reward(style=…): posttrain, trl or verifiers"
            )
        if not named:
            raise RewardError(f"reward {name}: takes no arguments; ask for completion and for dataset columns by name")
    if returns_list:
        raise RewardError(
            f"reward {name}: returns a list but asks for {' and '.join(singular) or 'single values'}; take completions "
            "(TRL) or return one number a sample"
        )
    if turns.get("completion") is False:
        return "posttrain"
    if turns.get("completion") is True or "state" in named:
        return "verifiers"
    return "posttrain"


def _text(annotation: object) -> str:
    """An annotation as written."""
    if isinstance(annotation, str):
        return annotation.strip("'\" ")
    return (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )


def _as_messages(function: Callable[..., Any], key: str, annotation: object) -> bool | None:
    """Whether parameter ``key`` wants messages, by annotation, then by what the body does with it."""
    if annotation is not inspect.Parameter.empty:
        text = _text(annotation).replace("typing.", "").replace("builtins.", "")
        chat = (
            "Message" in text or "dict" in text.lower() or (key in ("prompt", "completion") and "list" in text.lower())
        )
        if chat != ("str" in text.replace("dict[str", "").replace("Dict[str", "").replace("str, str", "")):
            return chat
    return True if _reads_turns(function, key) else None


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
