"""The keyword arguments of one call of a reward function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards.conventions import Convention
from posttrain.rl.rewards.sample import Sample
from posttrain.rl.rewards.signature import Signature


def call_arguments(signature: Signature, samples: Sequence[Sample]) -> dict[str, Any]:
    """What the function asks for, for the samples of one call: a single one unless the convention is batched.

    Raises ``RewardError`` where a required name is absent: ``Signature.missing`` knows of one row, rows may be uneven.
    """
    convention, found = signature.convention, {}
    for name in _asked(signature, samples):
        make = convention.makers.get(name)
        if make is not None:
            found[name] = make(samples, signature.as_messages.get(name))
        elif name in signature.required or _may_have_column(signature, name):
            value = _from_columns(convention, name, samples)
            if value is not ABSENT:
                found[name] = value
            elif name in signature.required:
                raise RewardError(
                    f"reward {signature.name} asks for {name}, which {samples[0].label} does not have "
                    f"(it has {', '.join(samples[0].prompt.columns) or 'no columns'}): "
                    "give the argument a default or add the column"
                )
    return found


def _asked(signature: Signature, samples: Sequence[Sample]) -> Sequence[str]:
    """Names of the parameters and, for ``**kwargs``, of everything there is."""
    if not signature.takes_all:
        return signature.names
    convention = signature.convention
    everything = dict.fromkeys((*signature.names, *convention.makers, *convention.columns))
    if convention.all_columns:
        for sample in samples[:1] if convention.one_group else samples:
            everything.update(dict.fromkeys(sample.prompt.columns))
    return [name for name in everything if name not in signature.bound]


def _may_have_column(signature: Signature, name: str) -> bool:
    return signature.convention.all_columns or name in signature.convention.columns


class _Absent:
    """No column has it; ``None`` is a value like any other."""


ABSENT = _Absent()


def _from_columns(convention: Convention, name: str, samples: Sequence[Sample]) -> Any:
    """The column's value; a list of them, with ``None`` where a row has none, in a batch of many prompts."""
    places = convention.places(name)
    if not convention.batched or convention.one_group:
        return _look_up(samples[0].prompt.columns, places)
    values = [_look_up(sample.prompt.columns, places) for sample in samples]
    if all(value is ABSENT for value in values):
        return ABSENT
    return [None if value is ABSENT else value for value in values]


def _look_up(columns: Mapping[str, Any], places: Sequence[str]) -> Any:
    for place in places:
        if place in columns:
            return columns[place]
        column, dot, key = place.partition(".")
        if dot and isinstance(inner := columns.get(column), Mapping) and key in inner:
            return inner[key]
    return ABSENT
