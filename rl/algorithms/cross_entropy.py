"""Supervised cross-entropy: −Σ A·logprobs / N, the advantages being weights (1 for plain demonstrations)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from posttrain.rl.algorithms.base import AdvantageInputs, Algorithm, LossInputs, LossOutput
from posttrain.rl.algorithms.ops import Tokens
from posttrain.rl.metrics import Mean, Metric, Sum

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Algorithm):
    """Maximum likelihood of the completions; on samples, every one of them is imitated whatever its reward."""

    name: Literal["cross_entropy"] = "cross_entropy"

    def advantages(self, inputs: AdvantageInputs) -> Tensor:
        """[B], ones."""
        return inputs.rewards.new_ones(inputs.rewards.numel())

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Nats a loss token of the whole optimizer step."""
        tokens = Tokens.of(inputs)
        loss = -tokens.sum(tokens.logprobs * tokens.advantages) / max(inputs.num_loss_tokens, 1)
        metrics: dict[str, Metric] = {
            "loss/total": Sum(loss.detach()),
            "loss/nats_per_token": Mean(-tokens.sum(tokens.logprobs.detach()), tokens.mask.sum()),
        }
        if tokens.entropy is not None:
            metrics["policy/entropy"] = Mean(tokens.sum(tokens.entropy.detach()), tokens.mask.sum())
        return LossOutput(loss, metrics)

    @property
    def needs_groups(self) -> bool:
        """Completions are not compared."""
        return False
