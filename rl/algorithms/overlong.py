"""DAPO's soft overlong punishment (2503.14476, eq. 13), on which rewards of length are built, too."""

from __future__ import annotations


def ramp(amount: float, start: float, end: float) -> float:
    """0 up to ``start``, 1 from ``end`` on, a straight line between; where the two are one, a step behind it."""
    if amount <= start:
        return 0.0
    return 1.0 if amount >= end else (amount - start) / (end - start)
