"""Metrics that know how to reduce: each carries what is needed to be merged over micro-batches, workers and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor

    Number = float | int | Tensor


class Metric(Protocol):
    """Anything with an associative ``merge`` and a final ``value`` (NaN when nothing was counted)."""

    def merge(self, other: Self) -> Self:
        """Combine two parts of the same metric."""
        ...

    def value(self) -> float:
        """The figure to report."""
        ...


@dataclass(slots=True, frozen=True)
class Mean:
    """Weighted mean: ``total / weight``. Tensors stay on their device until ``value`` is called."""

    total: Number
    weight: Number = 1.0

    def merge(self, other: Mean) -> Mean:
        """Add totals and weights."""
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float:
        """The mean, NaN for weight 0."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else math.nan


@dataclass(slots=True, frozen=True)
class Sum:
    """Plain sum."""

    total: Number

    def merge(self, other: Sum) -> Sum:
        """Add."""
        return Sum(self.total + other.total)

    def value(self) -> float:
        """The sum."""
        return float(self.total)


@dataclass(slots=True, frozen=True)
class Max:
    """Largest value seen."""

    largest: Number

    def merge(self, other: Max) -> Max:
        """Keep the larger."""
        return self if float(self.largest) >= float(other.largest) else other

    def value(self) -> float:
        """The largest."""
        return float(self.largest)


@dataclass(slots=True, frozen=True)
class Std:
    """Unbiased standard deviation of everything merged in (Chan's parallel form); 0 for a single value."""

    count: int
    mean: float
    squares: float
    """Sum of squared deviations from the mean."""

    @classmethod
    def of(cls, values: Iterable[float]) -> Std:
        """Count values one by one."""
        result = cls(0, 0.0, 0.0)
        for value in values:
            result = result.merge(cls(1, float(value), 0.0))
        return result

    def merge(self, other: Std) -> Std:
        """Combine two samples."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * other.count / count
        return Std(count, mean, self.squares + other.squares + delta * delta * self.count * other.count / count)

    def value(self) -> float:
        """The deviation, NaN when empty."""
        if self.count == 0:
            return math.nan
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merge dictionaries of metrics key by key; a key may be missing from some of them."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for key, metric in part.items():
            merged[key] = merged[key].merge(metric) if key in merged else metric
    return merged


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Final figures, in the order the keys came."""
    return {key: metric.value() for key, metric in metrics.items()}


def on_host(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The same with plain numbers in place of tensors: fit for a process that must not open the GPU."""
    return {
        key: type(metric)(*(_number(getattr(metric, field.name)) for field in fields(metric)))  # type: ignore[arg-type]
        for key, metric in metrics.items()
    }


def _number(value: Number) -> float | int:
    return value if isinstance(value, float | int) else value.item()
