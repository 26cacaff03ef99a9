"""From the scores of one completion to its reward: clipping, gating, weights that follow the step."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypedDict

from posttrain.rl.errors import RewardError

Points = Sequence[Sequence[float]]
"""(step, weight) pairs: linear in between, constant before the first and after the last."""
Weight = float | Points


class Override(TypedDict, total=False):
    """What stands in place of a function's own terms."""

    weight: Weight
    requires: Sequence[str]
    clip: Sequence[float]


@dataclass(slots=True, frozen=True)
class Terms:
    """How one function's score enters the reward. Raises ``ValueError`` for what is no weight, name or range."""

    weight: Weight = 1.0
    requires: Sequence[str] = ()
    """The score counts as 0 unless those of these functions, clipped and gated themselves, are above 0."""
    clip: Sequence[float] | None = None
    """Smallest and largest score, before the weight."""
    metric: bool = False
    """Recorded, and perhaps required by others, but no part of the reward."""

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        listed = isinstance(self.requires, Sequence) and not isinstance(self.requires, str)
        if not listed or not all(isinstance(name, str) for name in self.requires):
            raise ValueError(f'requires={self.requires!r}: requires is a list of reward names, as ["format"]')
        if self.clip is not None and not (_numbers(self.clip, 2) and self.clip[0] < self.clip[1]):
            raise ValueError(f"clip={self.clip!r}: clip is the smallest and the largest score, as [0, 1]")
        if self.metric and (self.weight or self.requires or self.clip):
            raise ValueError("a metric is no part of the reward: it has no weight, requires or clip")

    @property
    def scheduled(self) -> bool:
        """Whether the weight depends on the step."""
        return not isinstance(self.weight, int | float)

    @property
    def shaped(self) -> bool:
        """Whether what counts may differ from the score itself."""
        return bool(self.requires) or self.clip is not None

    def weight_at(self, step: int) -> float:
        """The weight of a step: of nothing else, so that a resumed run has the same."""
        if isinstance(self.weight, int | float):
            return float(self.weight)
        after = bisect_right([point[0] for point in self.weight], step)
        if after in (0, len(self.weight)):
            return float(self.weight[max(0, after - 1)][1])
        (start, low), (stop, high) = self.weight[after - 1 : after + 1]
        return low + (high - low) * (step - start) / (stop - start)


class Combining:
    """The terms of every function, by name."""

    def __init__(self, own: Mapping[str, Terms], overrides: Mapping[str, Override] | None = None) -> None:
        """``overrides`` stand in place of functions' ``own`` terms, field by field.

        Raises ``RewardError`` for a name that is no function's, terms that are none, or a circle of ``requires``.
        """
        overrides, there = overrides or {}, ", ".join(own)
        if unknown := sorted(set(overrides) - set(own)):
            raise RewardError(f"weight, requires or clip for {', '.join(unknown)}, but the rewards are {there}")
        self.terms = {name: _replaced(name, terms, overrides.get(name, {})) for name, terms in own.items()}
        for name, terms in self.terms.items():
            if unknown := sorted(set(terms.requires) - set(own)):
                raise RewardError(f"reward {name} requires {', '.join(unknown)}, but the rewards are {there}")
        try:
            sorter = TopologicalSorter({name: terms.requires for name, terms in self.terms.items()})
            self._order = tuple(sorter.static_order())
        except CycleError as error:
            circle = " requires ".join(reversed(error.args[1]))
            raise RewardError(f"reward {circle}: one of them must not, or none could ever count") from None

    def weights(self, step: int) -> dict[str, float]:
        """Weight of every function but the metrics, in a step."""
        return {name: terms.weight_at(step) for name, terms in self.terms.items() if not terms.metric}

    def counted(self, scores: Mapping[str, float | None]) -> dict[str, float | None]:
        """One completion's scores as they count: clipped, and 0 where a required one is not above 0 or does not apply.
        ``None`` stays ``None``; metrics are left out.
        """
        counted: dict[str, float | None] = {}
        for name in self._order:
            terms, score = self.terms[name], scores[name]
            if score is not None:
                if terms.clip is not None:
                    score = min(max(score, terms.clip[0]), terms.clip[1])
                if not all((counted[required] or 0.0) > 0 for required in terms.requires):
                    score = 0.0
            counted[name] = score
        return {name: counted[name] for name, terms in self.terms.items() if not terms.metric}


def total(counted: Mapping[str, float | None], weights: Mapping[str, float]) -> float:
    """The reward: what counts, weighed and summed; 0 where no function applies."""
    return math.fsum(weights[name] * score for name, score in counted.items() if score is not None)


def _replaced(name: str, terms: Terms, override: Override) -> Terms:
    try:
        return replace(terms, **override)
    except ValueError as error:
        raise RewardError(f"reward {name}: {error}") from None


def _check_weight(weight: Any) -> None:
    if _numbers([weight], 1):
        return
    if isinstance(weight, str) or not isinstance(weight, Sequence) or not weight:
        raise ValueError(f"weight={weight!r}: weight is a finite number, or a list of [step, weight]")
    if not all(_numbers(point, 2) for point in weight):
        raise ValueError(f"weight={weight!r}: a weight that follows the step is a list of [step, weight]")
    if any(later[0] <= earlier[0] for earlier, later in itertools.pairwise(weight)):
        raise ValueError(f"weight={weight!r}: the steps of a weight must increase")


def _numbers(values: Any, count: int) -> bool:
    """Whether these are so many finite numbers."""
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )
