"""The run on the console: a live line on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from posttrain.rl.run_dir import RunDir
from posttrain.rl.types import RolloutGroup

_WINDOW = 20
"""Steps whose mean duration gives the time that is left."""

_EVALUATED = {"eval/reward/mean": "reward"}


class ConsoleSink:
    """Step, reward, completion length, KL, tokens/s and the time left."""

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        *,
        live: bool = True,
        clock: Callable[[], float],
        console: Console | None = None,
    ) -> None:
        self._total, self._first = total_steps, first_step
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._live = live and self._console.is_terminal
        self._clock = clock
        self._times: deque[float] = deque(maxlen=_WINDOW + 1)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def start(self, run: RunDir) -> None:
        """Say where the run is, and show the live line on a terminal."""
        self._print(f"run {run.path}" + (f", going on after step {self._first}" if self._first else ""))
        if self._live:
            self._progress = Progress(
                SpinnerColumn(),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._progress.add_task("starting", total=self._total, completed=self._first)
            self._progress.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show one step; figures of an evaluation get a line of their own, which stays."""
        evaluation = [key for key in values if key == "eval/reward/mean" or key.startswith("eval/pass@")]
        if "reward/mean" in values:
            self._times.append(self._clock())
            figures = "  ".join(_figures(values))
            known = step < self._total and len(self._times) > 1
            left = f"  {_duration(self._seconds_left(step))} left" if known else ""
            if self._progress:
                self._progress.update(self._task, completed=step, description=figures + left)
            else:
                self._print(f"step {step}/{self._total}  {figures}{left}")
        if evaluation:
            shown = "  ".join(
                f"{_EVALUATED.get(key, key.removeprefix('eval/'))} {values[key]:.3f}" for key in evaluation
            )
            self._print(f"evaluation after step {step}  {shown}")

    def rollouts(self, step: int, groups: Sequence[RolloutGroup], *, evaluation: bool = False) -> None:
        """Samples are too long for a console; they are under ``rollouts/``."""

    def message(self, text: str) -> None:
        """Print it above the live line."""
        self._print(text)

    def close(self) -> None:
        """Leave the last live line standing."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _seconds_left(self, step: int) -> float:
        """From the mean of the last steps; pauses for evaluations and checkpoints are in it."""
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1) * (self._total - step)


def _figures(values: Mapping[str, float]) -> list[str]:
    """The few figures worth a glance, those that are there."""
    kl = next((key for key in ("policy/kl_ref", "policy/kl_sampler") if key in values), "policy/kl_sampler")
    shown = (
        ("reward", "reward/mean", ".3f"),
        ("length", "rollout/completion_tokens", ".1f"),
        ("kl", kl, ".2g"),
        ("tok/s", "perf/tokens_per_second", ",.0f"),
    )
    return [
        f"{label} {format(values[key], form) if math.isfinite(values[key]) else '–'}"
        for label, key, form in shown
        if key in values
    ]


def _duration(seconds: float) -> str:
    """``41s``, ``3m20s``, ``2h05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
