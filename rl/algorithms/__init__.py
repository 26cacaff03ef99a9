"""The algorithms by name. ``ALGORITHMS`` is the whole table: a new formula is a new file and a new line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.rl.algorithms.base import AdvantageInputs, Algorithm, LossInputs, LossOutput
from posttrain.rl.algorithms.cross_entropy import CrossEntropy
from posttrain.rl.algorithms.grpo import GRPO

ALGORITHMS: dict[str, type[Algorithm]] = {
    "grpo": GRPO,
    "cross_entropy": CrossEntropy,
}


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
