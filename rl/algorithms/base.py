"""The seam between a formula and everything else: what a loss receives, what it returns, what an algorithm is.

Shape letters: B sequences, T packed tokens, K reward functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from posttrain.rl.metrics import Metric


@dataclass(slots=True, frozen=True)
class LossInputs:
    """One packed micro-batch as a loss sees it. Position ``t`` of every ``[T]`` tensor speaks of token ``t`` itself.

    Values where ``loss_mask`` is false may be anything, NaN and infinity included; a loss selects with
    ``torch.where`` and never multiplies by a mask.
    """

    logprobs: Tensor
    """[T], requires grad; ``log p(token t | its sequence before t)`` at the sampler's temperature."""
    old_logprobs: Tensor
    """[T], the trainer's own before this step's first update; ``logprobs.detach()`` when strictly on-policy."""
    advantages: Tensor
    """[T]."""
    loss_mask: Tensor
    """bool [T]."""
    cu_seqlens: Tensor
    """int [B + 1]."""
    num_loss_tokens: int
    """N of the whole optimizer step (all micro-batches, all ranks)."""
    num_sequences: int
    """Sequences with at least one loss token, of the whole optimizer step."""
    num_micro_batches: int = 1
    """Micro-batches of the whole optimizer step; only BNPO uses it."""
    max_tokens: int = 0
    """Generation budget of a completion; only Dr.GRPO uses it."""
    ref_logprobs: Tensor | None = None
    """[T], needed where ``kl_coef`` is not 0."""
    rollout_logprobs: Tensor | None = None
    """[T], the sampler's; needed by corrections."""
    entropy: Tensor | None = None
    """[T], requires grad where ``entropy_coef`` is not 0."""
    entropy_threshold: float | None = None
    """Tokens below it are left out (top-entropy mask)."""


@dataclass(slots=True, frozen=True)
class LossOutput:
    """A scalar whose gradients, summed over the step's micro-batches, are the step's gradient; and its metrics."""

    loss: Tensor
    metrics: Mapping[str, Metric] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class AdvantageInputs:
    """Every completion of one step, group by group or not: ``group_ids`` says which belong together."""

    rewards: Tensor
    """float [B], the weighted total of each completion."""
    group_ids: Tensor
    """int64 [B]; groups may be uneven."""
    lengths: Tensor
    """int64 [B], loss tokens of each completion."""
    components: Tensor | None = None
    """float [B, K], raw score of each reward function, NaN where it does not apply."""
    weights: Tensor | None = None
    """float [K], weight of each reward function."""


class Algorithm(BaseModel, ABC):
    """An algorithm is its own configuration: frozen fields, an advantage and a loss, both pure functions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Key in the table of algorithms; each subclass narrows it to its own."""

    @abstractmethod
    def advantages(self, inputs: AdvantageInputs) -> Tensor:
        """Advantage of each completion, float [B]; 0 for a group of one."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutput:
        """Loss of one micro-batch, already divided by the step's global counts."""

    @property
    def needs_groups(self) -> bool:
        """Whether the advantage compares completions of one prompt (so a group needs two)."""
        return True

    @property
    def needs_reference(self) -> bool:
        """Whether ``ref_logprobs`` must be computed."""
        return False

    @property
    def needs_rollout_logprobs(self) -> bool:
        """Whether the sampler's logprobs enter the loss (so truncated sampling must be refused)."""
        return False

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the entropy enters the loss with a gradient."""
        return False

    @property
    def entropy_quantile(self) -> float | None:
        """Share of the step's tokens to leave out by entropy (0.8 keeps the top fifth), or ``None``."""
        return None

    @property
    def drops_equal_groups(self) -> bool:
        """Dynamic sampling: leave out groups whose rewards are all equal and draw others in their place."""
        return False

    @property
    def drops_truncated(self) -> bool:
        """Overlong filter: completions that ran into ``max_tokens`` are not trained on."""
        return False

    def length_penalty(self, length: int, max_tokens: int) -> float:
        """Added to a completion's reward before advantages (soft overlong punishment); at most 0."""
        return 0.0
