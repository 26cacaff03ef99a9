"""Pictures of a run: the reward curve, and the phases of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.rl.errors import CheckpointError
from posttrain.rl.run_dir import RunDir

PHASES = {
    "wake": "tab:gray",
    "rollout": "tab:blue",
    "reward": "tab:cyan",
    "sleep": "tab:gray",
    "wait": "lightgray",
    "train": "tab:orange",
    "score": "navajowhite",
    "forward_backward": "sandybrown",
    "optim_step": "chocolate",
    "publish": "tab:green",
    "export": "lightgreen",
    "load": "mediumseagreen",
    "evaluate": "tab:purple",
    "log": "tab:olive",
    "save": "tab:brown",
}
"""Colour of each phase, from the top row down."""


def series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was written as a number."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start: a constant stays that constant."""
    total = share = 0.0
    result = []
    for value in values:
        total = weight * total + (1 - weight) * value
        share = weight * share + (1 - weight)
        result.append(total / share)
    return result


def write_reward_plot(run: RunDir) -> Path:
    """Mean reward by step, raw and smoothed, and pass@1 of the evaluations; returns the path of the PNG.

    A run that was stopped before its first step gets empty axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = run.metrics()
    steps, rewards = series(rows, "reward/mean")
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, rewards, color="tab:blue", alpha=0.3, label="reward")
    axes.plot(steps, smooth(rewards), color="tab:blue", linewidth=2, label="reward, smoothed")
    eval_steps, passed = series(rows, "eval/pass@1")
    if eval_steps:
        axes.plot(eval_steps, passed, color="tab:orange", marker="o", label="held-out pass@1")
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.set_title(run.path.resolve().name)
    axes.grid(alpha=0.3)
    axes.legend()
    partial = run.plot_file.with_name(".partial_reward.png")  # a name that opening a run clears away
    figure.savefig(partial, format="png")
    partial.replace(run.plot_file)
    return run.plot_file


def write_timeline_plot(run: RunDir, step: int, path: Path) -> None:
    """When each phase of ``step`` ran, in seconds since the step's first, as a PNG.

    Raises ``CheckpointError`` where the run has no spans of that step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spans = run.timeline(step)
    if not spans:
        raise CheckpointError(f"{run.timeline_file}: nothing about step {step}")
    began = min(span.start for span in spans)
    found = {span.name for span in spans}
    names = [name for name in PHASES if name in found] + sorted(found - set(PHASES))
    figure = Figure(figsize=(8, 0.6 + 0.3 * len(names)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, name in enumerate(names):
        bars = [(span.start - began, span.stop - span.start) for span in spans if span.name == name]
        axes.broken_barh(bars, (row - 0.4, 0.8), color=PHASES.get(name, "black"))
        axes.annotate(f" {sum(width for _, width in bars):.3g} s", (sum(bars[-1]), row), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds")
    axes.set_title(f"step {step}")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, format="png")
