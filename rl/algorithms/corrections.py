"""Corrections for a sampler and a trainer that disagree on the same weights: a weight for every token's loss.

μ is the sampler's policy (``rollout_logprobs``), π_old the trainer's own before the update, π the trainer's now.
Weights carry no gradient, and a weight of 0 leaves the loss's denominator alone.

Shape letters: B sequences, T packed tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    NonNegativeFloat,
    PositiveFloat,
    SerializeAsAny,
    model_validator,
)

from posttrain.rl.algorithms.ops import LOG_LIMIT

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.rl.algorithms.ops import Tokens

C = TypeVar("C", bound="Correction")
Level = Literal["token", "sequence", "geometric"]


class Correction(BaseModel, ABC):
    """A correction is its own configuration. Subclass it and pass an instance to use one of your own."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    importance: ClassVar[bool] = True
    """Whether it multiplies by a ratio of policies (which a loss anchored at the sampler already does)."""
    name: str
    """Key in the table of corrections; each subclass narrows it to its own."""

    @abstractmethod
    def weights(self, tokens: Tokens) -> Tensor:
        """[T], factor of each token's loss, without gradient."""


class Tis(Correction):
    """Truncated importance sampling: min(π_old/μ, cap)."""

    name: Literal["tis"] = "tis"
    level: Level = "token"
    """Ratio of the token, product over the sequence, or its geometric mean (the product explodes with length)."""
    cap: PositiveFloat = 2.0

    def weights(self, tokens: Tokens) -> Tensor:
        """See the class."""
        return sampler_ratio(tokens, self.level).clamp(max=self.cap)


class Mis(Correction):
    """Masked importance sampling: π_old/μ inside [low, high], 0 outside."""

    name: Literal["mis"] = "mis"
    level: Level = "sequence"
    """Ratio of the token, product over the sequence, or its geometric mean (the product explodes with length)."""
    low: NonNegativeFloat = 0.0
    high: PositiveFloat = 3.0

    @model_validator(mode="after")
    def _interval(self) -> Self:
        return _ordered(self, self.low, self.high)

    def weights(self, tokens: Tokens) -> Tensor:
        """See the class."""
        return _inside(sampler_ratio(tokens, self.level), self.low, self.high)


class IcePop(Correction):
    """IcePop (2510.18855): π_old/μ of the token inside [low, high], 0 outside."""

    name: Literal["icepop"] = "icepop"
    low: NonNegativeFloat = 0.5
    high: PositiveFloat = 5.0

    @model_validator(mode="after")
    def _interval(self) -> Self:
        return _ordered(self, self.low, self.high)

    def weights(self, tokens: Tokens) -> Tensor:
        """See the class."""
        return _inside(sampler_ratio(tokens, "token"), self.low, self.high)


class Opsm(Correction):
    """Off-policy sequence masking (2512.02556): drops a sequence with A < 0 whose mean log μ − log π exceeds delta."""

    importance: ClassVar[bool] = False
    name: Literal["opsm"] = "opsm"
    delta: PositiveFloat = 0.5
    """Nats a token."""

    def weights(self, tokens: Tokens) -> Tensor:
        """See the class."""
        assert tokens.rollout_logprobs is not None
        gap = tokens.sequence_mean(tokens.rollout_logprobs - tokens.logprobs.detach())
        dropped = (tokens.spread(gap) > self.delta) & (tokens.advantages < 0)
        return (~dropped).to(tokens.logprobs.dtype)


def sampler_ratio(tokens: Tokens, level: Level) -> Tensor:
    """[T], π_old/μ of each token, or of its sequence as product or geometric mean; logarithms held to ±20."""
    log_ratio = tokens.sampler_log_ratio
    if level == "sequence":
        log_ratio = tokens.spread(tokens.sequence_sum(log_ratio).clamp(-LOG_LIMIT, LOG_LIMIT))
    elif level == "geometric":
        log_ratio = tokens.spread(tokens.sequence_mean(log_ratio))
    return log_ratio.exp()


def _ordered(correction: C, low: float, high: float) -> C:
    if low > high:
        raise ValueError(f"{correction.name}: low must be below high (got {low} and {high})")
    return correction


def _inside(ratio: Tensor, low: float, high: float) -> Tensor:
    return ratio.where((ratio >= low) & (ratio <= high), 0.0)


CORRECTIONS: dict[str, type[Correction]] = {"tis": Tis, "mis": Mis, "icepop": IcePop, "opsm": Opsm}


def parse_correction(value: object) -> object:
    """A correction from its name or a mapping of ``name`` and fields; instances pass through."""
    if value is None or isinstance(value, Correction):
        return value
    fields: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = fields.get("name")
    if name not in CORRECTIONS:
        raise ValueError(f"unknown correction {name!r}; known: {', '.join(CORRECTIONS)}")
    kind = CORRECTIONS[name]
    if unknown := fields.keys() - kind.model_fields:
        raise ValueError(f"{name} has no {', '.join(sorted(unknown))}; known: {', '.join(kind.model_fields)}")
    return kind(**fields)


AnyCorrection = Annotated[SerializeAsAny[Correction], BeforeValidator(parse_correction)]
