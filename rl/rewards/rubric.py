"""Runs reward functions over groups of completions, checks what they return, weighs and records it."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from posttrain.rl.errors import RewardError
from posttrain.rl.metrics import Max, Mean, Metric, Std, Sum
from posttrain.rl.rewards.combining import Combining, Override, total
from posttrain.rl.rewards.execution import Outcome, Reward
from posttrain.rl.rewards.sample import Sample
from posttrain.rl.rewards.signature import read
from posttrain.rl.types import Completion, Prompt, Rollout, RolloutGroup

if TYPE_CHECKING:
    from posttrain.rl.rewards.pool import Pool


class Rubric:
    """A weighted set of reward functions.

    Synchronous functions run one after another in a single worker thread, whatever is scored at the same time, so they
    need not be thread-safe and the event loop stays free; asynchronous ones and those in the pool of processes run
    concurrently. ``None`` means "does not apply": it is left out of the total, the mean and the std. A completion that
    no function applies to has reward 0, see ``reward/unscored``.
    """

    def __init__(
        self, functions: Sequence[Callable[..., Any]], overrides: Mapping[str, Override] | None = None
    ) -> None:
        """Read every signature. ``overrides`` by reward name stand in place of what the functions' decorators say.

        Raises ``RewardError`` where a signature fits no style, two rewards share a name, or they cannot be combined.
        """
        if not functions:
            raise RewardError("no reward functions: give at least one")
        self.signatures = [read(function) for function in functions]
        names = [signature.name for signature in self.signatures]
        for name in names:
            if names.count(name) > 1:
                raise RewardError(f"two rewards are called {name}: tell them apart with @reward(name=…)")
            if not name or "/" in name or name != name.strip():
                raise RewardError(
                    f"reward name {name!r}: it becomes the metric reward/<name>/mean, so no slash or blanks"
                )
        self.names = tuple(names)
        self.combining = Combining({signature.name: signature.tag.terms for signature in self.signatures}, overrides)
        self._worker = ThreadPoolExecutor(1, "rewards")
        self._pool: Pool | None = None
        self._rewards = [Reward(signature, self._processes) for signature in self.signatures]

    def close(self) -> None:
        """End the processes of isolated functions; the next call would start new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def check(self, columns: Iterable[str]) -> None:
        """Before any model loads: every function's arguments exist among ``columns``, or raise ``RewardError``."""
        known = sorted(set(columns))
        for signature in self.signatures:
            if missing := signature.missing(known):
                raise RewardError(
                    f"reward {signature.name} ({signature.style} style) asks for {', '.join(missing)}, which is no "
                    f"column of the dataset (columns: {', '.join(known) or 'none'}; the style itself provides "
                    f"{', '.join(signature.provided())}): rename the argument, give it a default, or add the column"
                )
            if hidden := signature.hidden(known):
                raise RewardError(
                    f"reward {signature.name} ({signature.style}) asks for {hidden[0]}, which is both a column of "
                    "the dataset and something the loop provides: rename the column, or read it through the argument "
                    'columns (columns["' + hidden[0] + '"], posttrain style)'
                )

    async def score(
        self, groups: Sequence[tuple[Prompt, Sequence[Completion]]], *, step: int = 0
    ) -> list[RolloutGroup]:
        """Score every completion of every group, in order. ``step`` decides the weights, and is handed to functions
        that ask for it. The loop scores each group by itself, as soon as it is drawn; calls may overlap.

        Raises ``RewardError`` naming the function and the sample for an exception, NaN, an infinity, a wrong number of
        scores or a result that is not a number, unless the function's ``on_error`` forgives it.
        """
        samples = [
            Sample(prompt, completion, index, step)
            for prompt, completions in groups
            for index, completion in enumerate(completions)
        ]
        found = await self._run(samples) if samples else {name: [] for name in self.names}
        weights = self.combining.weights(step)
        results: list[RolloutGroup] = []
        position = 0
        for prompt, completions in groups:
            rollouts = []
            for completion in completions:
                outcomes = {name: found[name][position] for name in self.names}
                raw = {name: outcome.score for name, outcome in outcomes.items()}
                failures = {name: outcome.failure for name, outcome in outcomes.items() if outcome.failure}
                counted = self.combining.counted(raw)
                reward = total(counted, weights)
                rollouts.append(Rollout(completion, raw, reward, failures=failures, counted=counted, weights=weights))
                position += 1
            results.append(RolloutGroup(prompt, rollouts))
        return results

    def metrics(self, groups: Iterable[RolloutGroup]) -> dict[str, Metric]:
        """``reward/mean``, ``reward/std`` (over all completions), ``reward/unscored`` (share with no score that counts)
        and, a function, ``reward/<name>/mean``, ``/std``, ``/max`` of its raw scores, ``/applies`` (share of
        completions it scored), ``/counted`` (mean of what is left where it is clipped or gated), ``/weight`` (where it
        follows the step) and, where there were any, ``/timeouts`` and ``/errors``. Where a function applied to nothing
        its figures of scores are absent.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        totals = [rollout.reward for rollout in rollouts]
        unscored = sum(all(score is None for score in rollout.counted.values()) for rollout in rollouts)
        result: dict[str, Metric] = {
            "reward/mean": Mean(math.fsum(totals), len(totals)),
            "reward/std": Std.of(totals),
            "reward/unscored": Mean(unscored, len(rollouts)),
        }
        for name, terms in self.combining.terms.items():
            raw = [score for rollout in rollouts if (score := rollout.rewards.get(name)) is not None]
            if raw:
                result[f"reward/{name}/mean"] = Mean(math.fsum(raw), len(raw))
                result[f"reward/{name}/std"] = Std.of(raw)
                result[f"reward/{name}/max"] = Max(max(raw))
            result[f"reward/{name}/applies"] = Mean(len(raw), len(rollouts))
            if terms.scheduled:
                weights = [rollout.weights[name] for rollout in rollouts]
                result[f"reward/{name}/weight"] = Mean(math.fsum(weights), len(weights))
            if raw and terms.shaped:
                counted = [score for rollout in rollouts if (score := rollout.counted[name]) is not None]
                result[f"reward/{name}/counted"] = Mean(math.fsum(counted), len(counted))
            for failure, key in (("timeout", "timeouts"), ("error", "errors")):
                if count := sum(rollout.failures.get(name) == failure for rollout in rollouts):
                    result[f"reward/{name}/{key}"] = Sum(count)
        return result

    async def _run(self, samples: Sequence[Sample]) -> dict[str, list[Outcome]]:
        """Outcomes of every function on every sample; the first failure cancels the rest."""
        blocking = [reward for reward in self._rewards if reward.blocking]
        jobs: list[Awaitable[dict[str, list[Outcome]]]] = [
            _named(reward, samples) for reward in self._rewards if not reward.blocking
        ]
        if blocking:
            run = contextvars.copy_context().run
            loop = asyncio.get_running_loop()
            jobs.append(loop.run_in_executor(self._worker, run, _all_blocking, blocking, samples))
        tasks = [asyncio.ensure_future(job) for job in jobs]
        try:
            parts = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return {name: outcomes for part in parts for name, outcomes in part.items()}

    def _processes(self) -> Pool:
        if self._pool is None:
            from posttrain.rl.rewards.pool import Pool

            self._pool = Pool()
        return self._pool


def _all_blocking(rewards: Sequence[Reward], samples: Sequence[Sample]) -> dict[str, list[Outcome]]:
    """Worker thread: every synchronous function, one call after another."""
    return {reward.signature.name: reward.score_blocking(samples) for reward in rewards}


async def _named(reward: Reward, samples: Sequence[Sample]) -> dict[str, list[Outcome]]:
    return {reward.signature.name: await reward.score(samples)}
