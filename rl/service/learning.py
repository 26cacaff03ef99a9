"""One batch becomes optimizer steps: advantages, packing, old and reference logprobs, gradients, updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from posttrain.rl import metrics
from posttrain.rl.batching import BatchSettings, assign_advantages, plan, with_scores
from posttrain.rl.metrics import Max, Mean, Metric
from posttrain.rl.service.micro_batches import MicroBatchBudget
from posttrain.rl.types import OptimParams

if TYPE_CHECKING:
    from posttrain.rl.config import Config
    from posttrain.rl.service.production import Batch
    from posttrain.rl.service.protocols import Learner
    from posttrain.rl.timeline import Timeline
    from posttrain.rl.types import TrainBatch


class LearningStep:
    """Trains on one batch at a time with the configuration's algorithm."""

    def __init__(
        self,
        config: Config,
        learner: Learner,
        learning_rate: Callable[[int], float],
        warn: Callable[[str], None],
    ) -> None:
        self._config = config
        self._learner = learner
        self._learning_rate = learning_rate
        self._budget = MicroBatchBudget(learner, config.trainer, warn)
        trainer, rollout = config.trainer, config.rollout
        self._settings = BatchSettings(
            micro_batch_tokens=trainer.micro_batch_tokens,
            updates=trainer.updates_per_batch,
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            share_prompts=trainer.share_prompts,
        )

    async def train(self, batch: Batch, timeline: Timeline, *, policy_version: int, rescore: bool) -> dict[str, Metric]:
        """Train on ``batch`` and return the step's metrics; an empty batch changes nothing.

        ``rescore`` asks for old logprobs from a pass of their own even where they are the same by construction: the
        check that an on-policy ratio is 1.
        """
        config, algorithm = self._config, self._config.algorithm
        parts: list[dict[str, Metric]] = [
            assign_advantages(batch.groups, algorithm, config.rollout.max_tokens),
            _staleness(batch, policy_version, config.trainer.updates_per_batch * config.trainer.epochs_per_batch),
        ]
        settings = replace(self._settings, micro_batch_tokens=self._budget.tokens)
        updates = [update for update in plan(batch.groups, algorithm, settings) if update]
        repeated = config.trainer.epochs_per_batch > 1 or len(updates) > 1
        score = partial(self._scored, old=repeated or rescore)
        with timeline.span("score"):
            updates = [await self._budget.run(update, score) for update in updates]
        params = self._params(batch.step)
        for _ in range(config.trainer.epochs_per_batch):
            for update in updates:
                with timeline.span("forward_backward"):
                    work = partial(self._learner.forward_backward, algorithm=algorithm)
                    parts.append(await self._budget.run(update, work))
                with timeline.span("optim_step"):
                    result = await self._learner.optim_step(params)
                parts.append({"optim/grad_norm": Mean(result.grad_norm), "optim/grad_norm_max": Max(result.grad_norm)})
        parts.append({"optim/learning_rate": Mean(params.learning_rate)})
        return metrics.merge(parts)

    async def _scored(self, update: Sequence[TrainBatch], *, old: bool) -> list[TrainBatch]:
        """Fill in what the algorithm compares with: old and reference logprobs, the entropy threshold."""
        quantile = self._config.algorithm.entropy_quantile
        scores = await self._learner.score(update) if old or quantile is not None else None
        reference = (
            await self._learner.score(update, reference=True) if self._config.algorithm.needs_reference else None
        )
        return with_scores(update, old=scores, ref=reference, entropy_quantile=quantile)

    def _params(self, step: int) -> OptimParams:
        trainer = self._config.trainer
        return OptimParams(
            learning_rate=self._learning_rate(step),
            betas=trainer.betas,
            eps=trainer.eps,
            weight_decay=trainer.weight_decay,
            max_grad_norm=trainer.max_grad_norm,
        )


def _staleness(batch: Batch, policy_version: int, versions_a_step: int) -> dict[str, Metric]:
    """How many steps old the policy was that drew the batch."""
    ages = [
        (policy_version - rollout.completion.policy_version) / versions_a_step
        for group in batch.groups
        for rollout in group.rollouts
    ]
    return {"staleness/mean": Mean(sum(ages), float(len(ages))), "staleness/max": Max(max(ages, default=0.0))}
