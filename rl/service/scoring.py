"""From prompts to scored groups: rewards work on the first groups while the sampler still draws the last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.rl.timeline import Timeline, union

if TYPE_CHECKING:
    from posttrain.rl.rewards.rubric import Rubric
    from posttrain.rl.service.protocols import Sampler
    from posttrain.rl.types import Completion, Prompt, RolloutGroup, SamplingParams

GROUPS_AT_ONCE = 64
"""Groups being scored at the same time; the others wait, so a slow judge is not flooded."""


@dataclass(slots=True, frozen=True)
class Drawn:
    """Scored groups, in the order of their prompts, and what they cost in seconds."""

    groups: list[RolloutGroup]
    rollout_s: float
    """From the first request to the last sample."""
    reward_s: float
    """What the rewards took after the last sample."""
    reward_busy_s: float
    """Time in which at least one group was being scored."""


@dataclass(slots=True, frozen=True)
class Draws:
    """Draws groups of one kind and scores each as soon as it is complete."""

    sampler: Sampler
    rubric: Rubric
    group_size: int
    params: SamplingParams

    async def groups(
        self,
        prompts: Sequence[Prompt],
        timeline: Timeline,
        *,
        step: int = 0,
        sampled: Callable[[], Awaitable[None]] | None = None,
    ) -> Drawn:
        """One scored group a prompt. ``sampled`` is called after the last sample, while rewards may still work.

        Nothing but the seconds depends on the order in which groups come. The first ``RewardError`` is raised at once:
        generation is abandoned, and so are the other groups.
        """
        scored: dict[int, RolloutGroup] = {}
        worked: list[tuple[float, float]] = []
        room = asyncio.Semaphore(GROUPS_AT_ONCE)

        async def score(index: int, completions: Sequence[Completion]) -> None:
            async with room:
                started = timeline.now()
                with timeline.span("reward"):
                    [scored[index]] = await self.rubric.score([(prompts[index], completions)], step=step)
                worked.append((started, timeline.now()))

        began = timeline.now()
        try:
            async with asyncio.TaskGroup() as scoring:
                stream = self.sampler.stream(prompts, self.group_size, self.params)
                try:
                    with timeline.span("rollout"):
                        async for index, completions in stream:
                            scoring.create_task(score(index, completions))
                finally:
                    if isinstance(stream, AsyncGenerator):
                        await stream.aclose()
                drawn = timeline.now()
                if sampled is not None:
                    await sampled()
        except ExceptionGroup as failures:  # the first is the cause; the rest were cancelled because of it
            raise failures.exceptions[0]  # noqa: B904  (it carries its own cause)
        assert sorted(scored) == list(range(len(prompts))), "the sampler did not draw every prompt once"
        rewarded = max([stop for _, stop in worked], default=drawn)
        return Drawn(
            [scored[index] for index in range(len(prompts))],
            rollout_s=drawn - began,
            reward_s=max(0.0, rewarded - drawn),
            reward_busy_s=sum(stop - start for start, stop in union(worked)),
        )
