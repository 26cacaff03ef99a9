"""Checks that run in production, on by default: each was a silent failure somewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from posttrain.rl.algorithms.policy import SamplerAnchored
from posttrain.rl.errors import EngineError

if TYPE_CHECKING:
    from posttrain.rl.config import Config
    from posttrain.rl.service.protocols import Learner

KL_SAMPLER_LIMIT = {"none": 1e-2, "nf4": 1e-2, "fp8": 6e-2}
"""Largest mean k3 between sampler and trainer that passes without a warning, by ``model.quantization``. Dense models in
bf16 stay below 1e-2. With nf4 both sides multiply by the same weights in the same type. With fp8 the engine rounds
activations too and the trainer does not: 0.05 nats a token are expected there against 0.02, and k3 grows with their
square, (0.05 / 0.02)² ≈ 6."""
RATIO_TOLERANCE = 1e-3
"""How far the largest on-policy ratio may be from 1 at the first step; it is exactly 1 in the reference path."""


class Checks:
    """Warns through ``warn``; raises ``EngineError`` where going on would only waste time."""

    def __init__(self, config: Config, warn: Callable[[str], None]) -> None:
        self._config = config
        self._warn = warn
        self._base_checksum: str | None = None
        self._fingerprint: str | None = None
        self._warned_kl = False

    def step(self, values: Mapping[str, float], *, rescored: bool) -> None:
        """Look at a step's figures; ``rescored`` where old logprobs came from a pass of their own."""
        trainer = self._config.trainer
        one_update = trainer.updates_per_batch * trainer.epochs_per_batch == 1  # after the first the ratio does move
        to_old_policy = not isinstance(self._config.algorithm, SamplerAnchored)
        ratios = (values.get("policy/ratio_mean", 1.0), values.get("policy/ratio_max", 1.0))
        ratio = max(ratios, key=lambda value: abs(value - 1.0))
        if rescored and one_update and to_old_policy and abs(ratio - 1.0) > RATIO_TOLERANCE:
            self._warn(
                f"exp(logprobs - old_logprobs) reaches {ratio:.6g} on the very policy that is trained: the trainer "
                "does not repeat its own forward pass (dropout, a non-deterministic kernel, or weights that moved)"
            )
        kl = values.get("policy/kl_sampler", 0.0)
        truncated = self._config.rollout.top_p < 1 or self._config.rollout.top_k > 0 or self._config.rollout.min_p > 0
        stale = self._config.rollout.max_staleness > 0
        limit = KL_SAMPLER_LIMIT[self._config.model.quantization]
        if kl > limit and not truncated and not stale and not self._warned_kl:
            self._warned_kl = True
            self._warn(
                f"sampler and trainer disagree: policy/kl_sampler {kl:.3g} is above {limit:g}. Compare their "
                f"weights' type (model.dtype = {self._config.model.dtype}, model.quantization = "
                f"{self._config.model.quantization}), the temperature ({self._config.rollout.temperature:g}), the chat "
                "template's tokens and the attention; "
                'algorithm.correction = {name = "tis"} limits the damage meanwhile'
            )

    def published(self, fingerprint: str, values: Mapping[str, float]) -> None:
        """The trained weights must have moved where ``values`` (of a step; empty at the start) show an update."""
        grad_norm, learning_rate = values.get("optim/grad_norm", 0.0), values.get("optim/learning_rate", 0.0)
        if grad_norm > 0 and learning_rate > 0 and fingerprint == self._fingerprint:
            raise EngineError(
                f"an optimizer step with gradient norm {grad_norm:.3g} and learning rate {learning_rate:.3g} left "
                'every trained weight as it was: raise trainer.learning_rate, or use model.dtype = "float32" where the '
                "weights' type rounds the update away"
            )
        self._fingerprint = fingerprint

    async def base_unchanged(self, learner: Learner) -> None:
        """The frozen base is what it was when first asked."""
        checksum = await learner.checksum()
        if self._base_checksum is None:
            self._base_checksum = checksum
        elif checksum != self._base_checksum:
            raise EngineError(
                f"the frozen base weights changed during the run ({self._base_checksum} to {checksum}): something "
                "writes into shared memory; checkpoints before this step are sound"
            )
