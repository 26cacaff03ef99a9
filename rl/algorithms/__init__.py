"""The algorithms by name. ``ALGORITHMS`` is the whole table: a new formula is a new file and a new line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.rl.algorithms.base import AdvantageInputs, Algorithm, LossInputs, LossOutput

ALGORITHMS: dict[str, type[Algorithm]] = {}


def parse(spec: str | Mapping[str, Any]) -> Algorithm:
    """An algorithm from its name, or from a mapping of ``name`` and its own fields.

    Raises ``ValueError`` naming the known algorithms for an unknown name.
    """
    fields = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = fields.get("name")
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}; known: {', '.join(sorted(ALGORITHMS))}")
    return ALGORITHMS[name](**fields)


__all__ = ["ALGORITHMS", "AdvantageInputs", "Algorithm", "LossInputs", "LossOutput", "parse"]
