"""From what a reward function returned to one score a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards.sample import Sample
from posttrain.rl.rewards.signature import Signature


def scores(signature: Signature, value: Any, samples: Sequence[Sample]) -> list[float | None]:
    """The scores of one call. Raises ``RewardError`` for what is none in the function's convention."""
    if not signature.convention.batched:
        return [_score(signature, value, samples[0])]
    value = signature.convention.unwrap_all(value)
    listed = hasattr(value, "__len__") and hasattr(value, "__iter__") and getattr(value, "shape", None) != ()
    if not listed or isinstance(value, str | bytes | Mapping | Set):
        raise RewardError(
            f"reward {signature.name} ({signature.style} style) returned {_short(value)} for {len(samples)} samples: "
            'return a list with one number (or None) a completion, or say style="areal" if completions is one text'
        )
    values = list(value)
    if len(values) != len(samples):
        raise RewardError(
            f"reward {signature.name} returned {len(values)} scores for {len(samples)} samples "
            f"({samples[0].label} to {samples[-1].label}): return one a completion"
        )
    return [_score(signature, item, sample) for item, sample in zip(values, samples, strict=True)]


def _score(signature: Signature, value: Any, sample: Sample) -> float | None:
    """A finite float or ``None``; anything else is an error, never a 0."""
    if type(value) is not float:
        value = signature.convention.unwrap(value)
        if value is None:
            return None
        if not isinstance(value, bool | int | float) and hasattr(value, "item"):
            try:
                value = value.item()  # numpy and torch scalars
            except (ValueError, RuntimeError):
                raise RewardError(
                    f"reward {signature.name} returned {_short(value)} on {sample.label}: return one number"
                ) from None
    if not isinstance(value, bool | int | float):
        raise RewardError(
            f"reward {signature.name} returned {_short(value)} on {sample.label}: return a number, or None where it "
            f"does not apply{_hint(signature)}"
        )
    if not math.isfinite(value):
        raise RewardError(
            f"reward {signature.name} returned {float(value)} on {sample.label}: return a finite number, or None where "
            "it does not apply"
        )
    return float(value)


def _hint(signature: Signature) -> str:
    return (
        "" if signature.convention.batched else '; functions that score a whole batch take completions or style="trl"'
    )


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:80]}{'…' if len(text) > 80 else ''}"
