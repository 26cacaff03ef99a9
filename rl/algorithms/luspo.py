"""LUSPO (2602.05261): GSPO with each sequence's loss multiplied by its length, which GSPO's gradient divides away."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat

from posttrain.rl.algorithms.gspo import GSPO
from posttrain.rl.algorithms.policy import Aggregation


class LUSPO(GSPO):
    """Length-unbiased sequence policy optimization."""

    name: Literal["luspo"] = "luspo"  # type: ignore[assignment]
    aggregation: Aggregation = "sequence_sum"
    clip_low: NonNegativeFloat = 2e-3
    clip_high: NonNegativeFloat = 2.5e-3
