"""Is the reply JSON that fits a schema?

Runs in the pool of processes: patterns, ``uniqueItems`` and recursive schemas can take any time on a text made for it,
and only a process can be stopped. What a ``$ref`` names must be in the schema, or be one of JSON Schema's own
meta-schemas: nothing is ever fetched.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.rl.errors import ConfigError, RewardError
from posttrain.rl.rewards.decorator import explains, factory, reward

if TYPE_CHECKING:
    from jsonschema.protocols import Validator  # type: ignore[import-untyped]

TIMEOUT_S = 5.0
"""What one reply may take; it then scores 0."""
FENCE = "```"


@factory
def json_schema(
    schema: Mapping[str, Any] | bool | str | None = None,
    *,
    partial: float = 0.0,
    whole: bool = False,
    name: str = "json_schema",
) -> Callable[..., float]:
    """1 for a reply of JSON that fits a schema.

    ``schema``: itself, the path of a JSON file (relative to the working directory), or, left out, the row's column
    ``schema`` (a dict, or JSON text). The JSON is the whole reply, else, unless ``whole``, its last fenced block.
    ``partial``, from 0 to 1: what JSON that does not fit earns, times the share of the top level's properties that do,
    of those required or given. Raises ``ConfigError`` for a schema that is none or that refers to what is not there.
    """
    if not 0 <= partial <= 1:
        raise ConfigError(f"partial = {partial}: a number from 0 to 1")
    if schema is None:
        return _by_row(partial, whole, name)
    try:
        text = _read_file(schema) if isinstance(schema, str) else json.dumps(schema)
        validator_of(text)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"schema: {error}") from None

    @reward(name=name, timeout=TIMEOUT_S)
    def fits(completion: str) -> float:
        return _score(completion, text, partial, whole)

    @explains(fits)
    def explain(completion: str) -> str:
        return _explanation(completion, text, whole)

    return fits


def extract(text: str, whole: bool = False) -> Any:
    """The JSON of a reply, strictly read: no NaN, no infinities. Raises ``ValueError`` or ``RecursionError``."""
    try:
        return _strict(text)
    except ValueError:
        if whole or (block := _last_block(text)) is None:
            raise
    return _strict(block)


@functools.lru_cache(maxsize=256)
def validator_of(schema: str) -> Validator:
    """A validator of a schema given as JSON text, of its own draft (2020-12 where it names none), which never looks
    beyond the schema. Raises ``ValueError`` for what is no schema, and for a ``$ref`` that leads nowhere.
    """
    from jsonschema.exceptions import SchemaError  # type: ignore[import-untyped]
    from jsonschema.validators import Draft202012Validator, validator_for  # type: ignore[import-untyped]
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]

    tree = json.loads(schema)
    if not isinstance(tree, dict | bool):
        raise ValueError(f"a JSON schema is an object, not {schema[:60]}")
    kind = validator_for(tree, default=Draft202012Validator)
    try:
        kind.check_schema(tree)
    except SchemaError as error:
        raise ValueError(f"no JSON schema: {error.message} at {error.json_path}") from None
    _follow_references(kind, tree, REGISTRY)
    validator: Validator = kind(tree, registry=REGISTRY)
    return validator


def _by_row(partial: float, whole: bool, name: str) -> Callable[..., float]:
    @reward(name=name, timeout=TIMEOUT_S)
    def fits_row(completion: str, schema: Any) -> float:
        return _score(completion, _of_row(schema), partial, whole)

    @explains(fits_row)
    def explain(completion: str, schema: Any) -> str:
        return _explanation(completion, _of_row(schema), whole)

    return fits_row


def _of_row(schema: object) -> str:
    """Raises ``RewardError`` for a column that holds no usable schema: that is the data's fault, not the reply's."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        validator_of(text)
    except (ValueError, TypeError) as error:
        raise RewardError(f"column schema: {error}") from None
    return text


def _score(completion: str, schema: str, partial: float, whole: bool) -> float:
    try:
        value = extract(completion, whole)
        validator = validator_of(schema)
        if validator.is_valid(value):
            return 1.0
        return partial * _fitting_share(validator, value) if partial else 0.0
    except (ValueError, RecursionError, ArithmeticError):  # not JSON, too deep, or a number beyond floats
        return 0.0


def _fitting_share(validator: Validator, value: object) -> float:
    """Of the properties that the schema's top level requires, or describes and the object has: how many are right."""
    schema = validator.schema
    if not isinstance(schema, dict) or not isinstance(value, dict):
        return 0.0
    described, required = schema.get("properties", {}), schema.get("required", [])
    asked = {*required, *(key for key in described if key in value)}
    right = sum(
        key in value and next(iter(validator.descend(value[key], described.get(key, True))), None) is None
        for key in asked
    )
    return right / len(asked) if asked else 0.0


def _explanation(completion: str, schema: str, whole: bool) -> str:
    try:
        value = extract(completion, whole)
    except RecursionError:
        return "nested too deeply to be read"
    except ValueError as error:
        return f"no JSON: {error}"
    try:
        found = next(iter(validator_of(schema).iter_errors(value)), None)
    except (RecursionError, ArithmeticError) as error:
        return f"cannot be checked: {error}"
    return "fits the schema" if found is None else f"{found.json_path}: {found.message[:200]}"


def _follow_references(kind: Any, schema: Mapping[str, Any] | bool, registry: Any) -> None:
    """Look up every reference once."""
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    dialect = kind.META_SCHEMA.get("$id", kind.META_SCHEMA.get("id"))
    root = specification_with(dialect, default=DRAFT202012).create_resource(schema)
    base = root.id() or ""
    waiting = [(root, registry.with_resource(base, root).resolver(base))]
    while waiting:
        resource, resolver = waiting.pop()
        for key in ("$ref", "$dynamicRef", "$recursiveRef") if isinstance(resource.contents, dict) else ():
            if isinstance(reference := resource.contents.get(key), str):
                try:
                    resolver.lookup(reference)
                except Unresolvable:
                    raise ValueError(
                        f"{key} {reference} leads nowhere: put what it names under $defs (nothing is fetched)"
                    ) from None
        waiting.extend((inner, resolver.in_subresource(inner)) for inner in resource.subresources())


def _last_block(text: str) -> str | None:
    """What stands between the last two lines of backticks; such a line cannot be inside JSON."""
    last: str | None = None
    block: list[str] | None = None
    for line in text.split("\n"):
        mark = line.strip()
        if not mark.startswith(FENCE):
            if block is not None:
                block.append(line)
        elif block is not None and not mark.strip("`"):
            last, block = "\n".join(block), None
        else:
            block = []
    return last


def _read_file(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"schema = {path!r}: not a readable file: {error}") from None


def _strict(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
