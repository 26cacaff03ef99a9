"""A reward function's signature, and the calling convention (style) it follows.

| style | called | receives, by name | returns |
|---|---|---|---|
| ``posttrain`` | once a sample | ``completion: str``, ``prompt``, ``finish_reason``…, columns | number or ``None`` |
| ``group`` | once a group | ``completions: list[str]``, ``prompt``, ``finish_reasons``…, columns as they are | a list |
| ``trl`` | once a batch | ``prompts``, ``completions``, ``completion_ids``, columns, each a list | a list |
| ``verifiers`` | once a sample | ``prompt``, ``completion`` (messages), ``state``, ``info``…, columns | number |
| | once a batch | ``completions``, ``states``, ``answers``, ``infos``, ``tasks``, each a list | a list |
| | once a sample | since 0.2: ``trace``, ``task``, or ``self`` and ``trace`` | number, or numbers by name |
| ``verl`` | once a sample | ``data_source``, ``solution_str``, ``ground_truth``, ``extra_info`` | number or ``score`` |
| | once a batch | ``data_sources``, ``solution_strs``, ``ground_truths``, ``extra_infos`` | a list of those |
| ``openrlhf`` | once a batch | ``queries`` (prompt and reply), ``prompts``, ``labels`` | tensor or ``rewards`` |
| ``areal`` | once a sample | ``prompt``, ``completions`` (one text), ``prompt_ids``, columns | number |

``score`` and ``rewards`` are keys of a dict, whose other entries are not kept. A batch is one group, the completions of
one prompt: rewards work while other groups are still being sampled. ``openrlhf`` and ``areal`` hand over prompts as
text: of a chat row, its last user turn.

Chosen in this order:

1. ``style=`` of the decorator. Only so ``group``: plural names alone are TRL's.
2. A name that one convention alone has: ``solution_str`` or ``solution_strs`` → ``verl``; ``queries`` → ``openrlhf``;
   ``completions`` annotated ``str``, or beside ``prompt_ids`` → ``areal``, where it is one text for all its name says;
   ``trace``, ``traces``, ``state`` (unless ``completion: str`` stands beside it), or ``states``, ``answers``,
   ``infos``, ``tasks`` without ``**kwargs`` (with them they may as well be TRL's columns: refused) → ``verifiers``.
   Names of two conventions are refused.
3. ``prompts`` or ``completions`` → ``trl``. So are ``completion_ids`` or columns alone where the return annotation is a
   list, and ``completion_ids`` beside ``**kwargs`` with no return annotation.
4. ``completion: str`` → ``posttrain``. ``completion: Messages`` or any list → ``verifiers``.
5. ``completion`` without annotation: ``verifiers`` when ``parser`` is asked for, or when the body reads it as messages
   (``completion[-1]["content"]``, a loop over turns); else ``posttrain``. A wrong guess fails loudly on the first call,
   since a string cannot be read as messages, and the error says which style was used.
6. No ``completion`` at all: ``posttrain``, provided one of its own names or a column is asked for.

Messages or text: an annotation decides, then the body as in 5, then the row (TRL and verifiers hand messages for chat
rows and strings for text rows).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards.conventions import Convention, form
from posttrain.rl.rewards.decorator import RewardTag, Style, tag_of
from posttrain.rl.rewards.dispatch import choose
from posttrain.rl.rewards.turns import annotation_text, as_messages


@dataclass(slots=True, frozen=True)
class Signature:
    """A reward function, ready to be called by name."""

    function: Callable[..., Any]
    name: str
    convention: Convention
    is_async: bool
    required: tuple[str, ...]
    """Parameters without a default."""
    optional: tuple[str, ...]
    """Parameters with one: filled where there is something to fill them with."""
    takes_all: bool
    """It has ``**kwargs``."""
    bound: frozenset[str] = frozenset()
    """What a ``functools.partial`` has filled: never filled again."""
    tag: RewardTag = field(default_factory=RewardTag)
    """What the decorator says of it."""
    as_messages: dict[str, bool | None] = field(default_factory=dict)
    """Prompt and completion parameters: messages, text, or (``None``) whichever the row is."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every named parameter."""
        return self.required + self.optional

    @property
    def style(self) -> Style:
        """Name of its calling convention."""
        return self.convention.style

    def provided(self) -> tuple[str, ...]:
        """Names this style fills without a column."""
        return tuple(self.convention.makers)

    def hidden(self, columns: Collection[str]) -> list[str]:
        """Asked-for names that a column has too, where it is open which of the two is meant."""
        clear = {"prompt", "prompts", "completion", "completions", "info", "task", "extra_info"}
        return [name for name in self.names if name in self.provided() and name in columns and name not in clear]

    def missing(self, columns: Collection[str]) -> list[str]:
        """Required parameters that neither the style nor the dataset provides, with the columns that would do."""
        found = []
        for name in self.required:
            places = self.convention.places(name)
            if name not in self.convention.makers and not {place.partition(".")[0] for place in places} & set(columns):
                found.append(name if places == (name,) else f"{name} (column {' or '.join(places)})")
        return found


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
    turns = {key: as_messages(function, key, value.annotation) for key, value in named.items() if key in _SPEECH}
    style = tag.style or choose(name, named, takes_all, _return_annotation(function), turns)
    bound = _bound(function)
    return Signature(
        function=function,
        name=name,
        convention=form(style, named),
        is_async=_is_async(function),
        required=tuple(key for key, value in named.items() if value.default is value.empty),
        optional=tuple(key for key, value in named.items() if value.default is not value.empty and key not in bound),
        takes_all=takes_all,
        bound=bound,
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


def _bound(function: Callable[..., Any]) -> frozenset[str]:
    """Keywords of partials around it."""
    found: set[str] = set()
    inner: Any = function
    while isinstance(inner, functools.partial):
        found |= set(inner.keywords)
        inner = inner.func
    return frozenset(found)


def _is_async(function: Callable[..., Any]) -> bool:
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def _return_annotation(function: Callable[..., Any]) -> str:
    return annotation_text(inspect.signature(function).return_annotation)
