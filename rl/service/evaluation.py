"""Evaluation on held-out prompts: mean reward, pass@1 and pass@k."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain.rl import metrics
from posttrain.rl.service.production import rollout_metrics, sampling_params
from posttrain.rl.service.scoring import Draws
from posttrain.rl.timeline import Timeline
from posttrain.rl.types import Prompt, RolloutGroup

if TYPE_CHECKING:
    from posttrain.rl.config import Config
    from posttrain.rl.rewards.rubric import Rubric
    from posttrain.rl.service.protocols import Sampler

_KEPT = ("rollout/completion_tokens", "rollout/truncated")


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` samples passes (2107.03374, eq. 1)."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


class Evaluator:
    """Scores the same held-out prompts with the same seeds every time, so differences are the policy's."""

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        rubric: Rubric,
        prompts: Sequence[Prompt],
        stop_token_ids: tuple[int, ...],
    ) -> None:
        self._config = config
        self._rubric = rubric
        self._prompts = list(prompts[: config.evaluation.max_prompts])
        params = dataclasses.replace(
            sampling_params(config, stop_token_ids),
            temperature=config.evaluation.temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
        )
        self._draws = Draws(sampler, rubric, config.evaluation.samples, params)

    async def evaluate(self) -> tuple[dict[str, float], list[RolloutGroup]]:
        """Figures under ``eval/`` and the rollouts behind them, with the last step's weights whatever the step: figures
        of different steps compare.
        """
        samples = self._config.evaluation.samples
        groups = (await self._draws.groups(self._prompts, Timeline(), step=self._config.steps)).groups
        figures = {
            key.replace("reward/", "eval/reward/") if key.startswith("reward/") else f"eval/{key}": value
            for key, value in metrics.values({**self._rubric.metrics(groups), **rollout_metrics(groups)}).items()
            if key.startswith("reward/") or key in _KEPT
        }
        correct = [sum(r.reward >= self._config.evaluation.success for r in group.rollouts) for group in groups]
        for k in sorted({1, samples}):
            figures[f"eval/pass@{k}"] = sum(pass_at_k(c, samples, k) for c in correct) / len(correct)
        figures["eval/prompts"] = float(len(groups))
        return figures, groups
