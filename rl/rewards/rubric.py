"""Runs reward functions over groups of completions, checks what they return, weighs and records it."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from posttrain.rl.errors import RewardError
from posttrain.rl.metrics import Mean, Metric, Std
from posttrain.rl.rewards.arguments import Sample, batch_arguments, sample_arguments
from posttrain.rl.rewards.signature import Signature, read
from posttrain.rl.types import Completion, Prompt, Rollout, RolloutGroup

Scores = list[float | None]


class Rubric:
    """A weighted set of reward functions.

    Synchronous functions run one after another in a single worker thread, whatever is scored at the same time, so they
    need not be thread-safe and the event loop stays free; asynchronous ones run concurrently. ``None`` means "does not
    apply": it is left out of the total, the mean and the std. A completion that no function applies to has reward 0,
    see ``reward/unscored``.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], weights: Mapping[str, float] | None = None) -> None:
        """Read every signature. ``weights`` by reward name stand in place of the functions' own.

        Raises ``RewardError`` where a signature fits no style, two rewards share a name, or a weight has no reward.
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
        overrides = dict(weights or {})
        if unknown := sorted(set(overrides) - set(names)):
            raise RewardError(f"weight for {', '.join(unknown)}, but the rewards are {', '.join(names)}")
        if bad := [name for name, weight in overrides.items() if not math.isfinite(weight)]:
            raise RewardError(f"weight of {bad[0]} is {overrides[bad[0]]}: weights are finite numbers")
        self.weights: dict[str, float] = {
            signature.name: float(overrides.get(signature.name, signature.weight)) for signature in self.signatures
        }
        self._worker = ThreadPoolExecutor(1, "rewards")

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
        """Score every completion of every group, in order. ``step`` is handed to functions that ask for it. The loop
        scores each group by itself, as soon as it is drawn; calls may overlap.

        Raises ``RewardError`` naming the function and the sample for an exception, NaN, an infinity, a wrong number of
        scores or a result that is not a number.
        """
        samples = [
            Sample(prompt, completion, index, step)
            for prompt, completions in groups
            for index, completion in enumerate(completions)
        ]
        scores = await self._run(samples) if samples else {name: [] for name in self.weights}
        results: list[RolloutGroup] = []
        position = 0
        for prompt, completions in groups:
            rollouts = []
            for completion in completions:
                raw = {name: scores[name][position] for name in self.weights}
                rollouts.append(Rollout(completion, raw, self._total(raw)))
                position += 1
            results.append(RolloutGroup(prompt, rollouts))
        return results

    def metrics(self, groups: Iterable[RolloutGroup]) -> dict[str, Metric]:
        """``reward/mean``, ``reward/std`` (over all completions), ``reward/unscored`` (share with no score at all)
        and, a function, ``reward/<name>/mean``, ``/std`` and ``/applies`` (share of completions it scored). Where a
        function applied to nothing its mean and std are absent.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        totals = [rollout.reward for rollout in rollouts]
        unscored = sum(all(score is None for score in rollout.rewards.values()) for rollout in rollouts)
        result: dict[str, Metric] = {
            "reward/mean": Mean(math.fsum(totals), len(totals)),
            "reward/std": Std.of(totals),
            "reward/unscored": Mean(unscored, len(rollouts)),
        }
        for name in self.weights:
            raw = [score for rollout in rollouts if (score := rollout.rewards.get(name)) is not None]
            if raw:
                result[f"reward/{name}/mean"] = Mean(math.fsum(raw), len(raw))
                result[f"reward/{name}/std"] = Std.of(raw)
            result[f"reward/{name}/applies"] = Mean(len(raw), len(rollouts))
        return result

    def _total(self, raw: Mapping[str, float | None]) -> float:
        return math.fsum(self.weights[name] * score for name, score in raw.items() if score is not None)

    async def _run(self, samples: Sequence[Sample]) -> dict[str, Scores]:
        """Scores of every function on every sample; the first failure cancels the rest."""
        blocking = [signature for signature in self.signatures if not signature.is_async]
        jobs: list[Awaitable[dict[str, Scores]]] = [
            _score_async(signature, samples) for signature in self.signatures if signature.is_async
        ]
        if blocking:
            run = contextvars.copy_context().run
            loop = asyncio.get_running_loop()
            jobs.append(loop.run_in_executor(self._worker, run, _score_blocking, blocking, samples))
        tasks = [asyncio.ensure_future(job) for job in jobs]
        try:
            parts = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return {name: scores for part in parts for name, scores in part.items()}


def _score_blocking(signatures: Sequence[Signature], samples: Sequence[Sample]) -> dict[str, Scores]:
    """Worker thread: every synchronous function, one call after another."""
    result: dict[str, Scores] = {}
    for signature in signatures:
        if signature.style == "trl":
            with _Blame(signature, samples):
                value = signature.function(**batch_arguments(signature, samples, _trainer_state(samples)))
            result[signature.name] = _batch_scores(signature, value, samples)
        else:
            scores: Scores = []
            for sample in samples:
                with _Blame(signature, [sample]):
                    value = signature.function(**sample_arguments(signature, sample))
                scores.append(_score(signature, value, sample))
            result[signature.name] = scores
    return result


async def _score_async(signature: Signature, samples: Sequence[Sample]) -> dict[str, Scores]:
    """One asynchronous function on every sample at once (TRL style: one call)."""
    if signature.style == "trl":
        with _Blame(signature, samples):
            value = await signature.function(**batch_arguments(signature, samples, _trainer_state(samples)))
        return {signature.name: _batch_scores(signature, value, samples)}

    async def one(sample: Sample) -> float | None:
        with _Blame(signature, [sample]):
            value = await signature.function(**sample_arguments(signature, sample))
        return _score(signature, value, sample)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_unwrapped_error(one(sample))) for sample in samples]
    outcomes = [task.result() for task in tasks]
    for outcome in outcomes:
        if isinstance(outcome, RewardError):
            raise outcome
    return {signature.name: [outcome for outcome in outcomes if not isinstance(outcome, RewardError)]}


async def _unwrapped_error(score: Awaitable[float | None]) -> float | RewardError | None:
    """Hand a failure back as a value, so that the first sample's is the one reported."""
    try:
        return await score
    except RewardError as error:
        return error


def _trainer_state(samples: Sequence[Sample]) -> SimpleNamespace:
    return SimpleNamespace(global_step=samples[0].step)


class _Blame:
    """Turns whatever the user's function raises into a ``RewardError`` with the cause chained."""

    def __init__(self, signature: Signature, samples: Sequence[Sample]) -> None:
        self.signature = signature
        self.samples = samples

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, RewardError):
            return
        where = self.samples[0].label
        if len(self.samples) > 1:
            where = f"a batch of {len(self.samples)} samples, {where} to {self.samples[-1].label}"
        hint = ""
        if isinstance(error, TypeError | KeyError | IndexError | AttributeError):
            hint = (
                f" (called in {self.signature.style} style; @reward(style=…) changes it: posttrain, trl or verifiers)"
            )
        raise RewardError(
            f"reward {self.signature.name} raised {type(error).__name__} on {where}: {error}{hint}"
        ) from error


def _batch_scores(signature: Signature, value: object, samples: Sequence[Sample]) -> Scores:
    """One score a sample out of what a TRL-style function returned."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
        raise RewardError(
            f"reward {signature.name} (trl style) returned {_short(value)} for {len(samples)} samples: "
            "return a list with one number (or None) a completion"
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
        hint = (
            "" if signature.style == "trl" else '; functions that score a whole batch take completions or style="trl"'
        )
        raise RewardError(
            f"reward {signature.name} returned {_short(value)} on {sample.label}: return a number, or None where it "
            f"does not apply{hint}"
        )
    if not math.isfinite(value):
        raise RewardError(
            f"reward {signature.name} returned {float(value)} on {sample.label}: return a finite number, or None where "
            "it does not apply"
        )
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:80]}{'…' if len(text) > 80 else ''}"
