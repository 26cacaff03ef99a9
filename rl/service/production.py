"""From the data cursor to a step's scored rollouts: prompts, sampling, rewards, dynamic sampling with refill."""

from __future__ import annotations

import math
import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.rl import metrics
from posttrain.rl.metrics import Max, Mean, Metric, Std, Sum
from posttrain.rl.service.scoring import Drawn, Draws
from posttrain.rl.types import Completion, Prompt, Rollout, RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from posttrain.rl.config import Config
    from posttrain.rl.data import PromptSource
    from posttrain.rl.rewards.rubric import Rubric
    from posttrain.rl.service.protocols import Sampler
    from posttrain.rl.timeline import Timeline

_METRICS: dict[str, type] = {"Mean": Mean, "Sum": Sum, "Max": Max, "Std": Std}


@dataclass(slots=True)
class Batch:
    """The rollouts of one step."""

    step: int
    groups: list[RolloutGroup]
    """What is trained on."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    """Over everything sampled, groups left out by dynamic sampling included."""
    cursor: dict[str, Any] = field(default_factory=dict)
    """The data cursor after this batch."""


def sampling_params(config: Config, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """How training rollouts are drawn."""
    rollout = config.rollout
    return SamplingParams(
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        stop_token_ids=stop_token_ids,
        seed=config.seed,
    )


def tied(group: RolloutGroup) -> bool:
    """Whether all completions of a group earned the same: nothing to learn from."""
    return len({rollout.reward for rollout in group.rollouts}) < 2


def length_correlation(group: RolloutGroup) -> float | None:
    """Pearson's correlation of length and reward; ``None`` where either is the same for all."""
    lengths = [float(len(rollout.completion.completion_ids)) for rollout in group.rollouts]
    if tied(group) or len(set(lengths)) < 2:
        return None
    return statistics.correlation(lengths, [rollout.reward for rollout in group.rollouts])


class Producer:
    """Produces one batch a step. Not reentrant: the caller serialises ``produce``."""

    def __init__(
        self, config: Config, sampler: Sampler, rubric: Rubric, source: PromptSource, stop_token_ids: tuple[int, ...]
    ) -> None:
        self._config = config
        self._rubric = rubric
        self._source = source
        self._draws = Draws(sampler, rubric, config.rollout.group_size, sampling_params(config, stop_token_ids))

    async def produce(self, step: int, timeline: Timeline, rest: Callable[[], Awaitable[None]]) -> Batch:
        """Sample and score until the step has its prompts, or the refills are spent.

        ``rest`` is called once, as soon as it is known that the sampler has nothing more to draw for this batch.
        """
        wanted = self._config.rollout.prompts_per_step
        drop_ties = self._config.algorithm.drops_equal_groups
        refills = self._config.rollout.max_refills if drop_ties else 0
        kept: list[RolloutGroup] = []
        parts: list[Mapping[str, Metric]] = []
        for left in reversed(range(1 + refills)):
            dropped = self._source.dropped
            prompts = self._source.take(wanted - len(kept))
            drawn = await self._draws.groups(prompts, timeline, step=step, sampled=None if left else rest)
            parts += [self._figures(drawn), {"rollout/prompts_too_long": Sum(float(self._source.dropped - dropped))}]
            kept += [group for group in drawn.groups if not (drop_ties and tied(group))]
            if left and len(kept) == wanted:
                await rest()
                break
        return Batch(step, kept, metrics.merge(parts), self._source.state())

    def _figures(self, drawn: Drawn) -> dict[str, Metric]:
        return {
            **self._rubric.metrics(drawn.groups),
            **rollout_metrics(drawn.groups),
            "time/rollout_s": Sum(drawn.rollout_s),
            "time/reward_s": Sum(drawn.reward_s),
            "time/reward_busy_s": Sum(drawn.reward_busy_s),
        }


def rollout_metrics(groups: list[RolloutGroup]) -> dict[str, Metric]:
    """Lengths, truncation and ties of what was sampled, and the mean over groups of the correlation (Pearson's) of
    length and reward among a group's completions: across prompts, hard ones are both long and badly rewarded.
    """
    completions = [rollout.completion for group in groups for rollout in group.rollouts]
    lengths = [float(len(completion.completion_ids)) for completion in completions]
    truncated = sum(completion.finish_reason == "length" for completion in completions)
    prompt_tokens = [len(group.prompt.prompt_ids) for group in groups]
    correlations = [r for group in groups if (r := length_correlation(group)) is not None]
    return {
        "rollout/completion_tokens": Mean(sum(lengths), float(len(lengths))),
        "rollout/completion_tokens_std": Std.of(lengths),
        "rollout/completion_tokens_max": Max(max(lengths, default=0.0)),
        "rollout/prompt_tokens": Mean(float(sum(prompt_tokens)), float(len(prompt_tokens))),
        "rollout/truncated": Mean(float(truncated), float(len(completions))),
        "rollout/length_correlation": Mean(math.fsum(correlations), float(len(correlations))),
        "rollout/tied_groups": Mean(float(sum(map(tied, groups))), float(len(groups))),
        "rollout/groups": Sum(float(len(groups))),
    }


def batch_to_json(batch: Batch) -> dict[str, Any]:
    """A batch as plain data, for the checkpoint of a run that generates ahead. Floats survive exactly."""
    return {
        "step": batch.step,
        "groups": [asdict(group) for group in batch.groups],
        "metrics": {
            key: [type(metric).__name__, *(float(part) for part in asdict(metric).values())]  # type: ignore[call-overload]
            for key, metric in batch.metrics.items()
        },
        "cursor": batch.cursor,
    }


def batch_from_json(data: Mapping[str, Any]) -> Batch:
    """Undo ``batch_to_json``."""
    groups = []
    for group in data["groups"]:
        prompt = Prompt(**{**group["prompt"], "prompt_ids": tuple(group["prompt"]["prompt_ids"])})
        rollouts = []
        for rollout in group["rollouts"]:
            fields = rollout["completion"]
            fields["completion_ids"] = tuple(fields["completion_ids"])
            fields["rollout_logprobs"] = tuple(fields["rollout_logprobs"])
            rollouts.append(Rollout(**{**rollout, "completion": Completion(**fields)}))
        groups.append(RolloutGroup(prompt, rollouts))
    figures = {key: _METRICS[kind](*parts) for key, (kind, *parts) in data["metrics"].items()}
    return Batch(data["step"], groups, figures, data["cursor"])
