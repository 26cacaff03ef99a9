"""Does a real model learn? SmolLM2-135M on two tasks, by GRPO and GSPO, over a bfloat16 and an nf4 base: eight runs.

    python tests/benchmarks/learning.py --out learning [--parallel 4] [--seconds 420] [--steps 150] [--engine vllm]

Each run is one of the examples in a process of its own; several share the GPU, each within its own memory. What is
still running when the time is up is killed, and counts as far as it got. Writes the metrics of every run, curves.png
and table.md into ``--out`` and prints the table last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import Job, kill, start

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TASKS = {"addition": "smollm2_addition.py", "chain_sum": "smollm2_chain_sum.py"}
GOAL = 0.8
"""Held-out pass@1 whose first step is reported."""


@dataclass(slots=True, frozen=True)
class Cell:
    """One run."""

    task: str
    algorithm: str
    quantization: str

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return f"{self.task}-{self.algorithm}-{'bf16' if self.quantization == 'none' else self.quantization}"


@dataclass(slots=True, frozen=True)
class Curve:
    """What a run's metrics say."""

    steps: list[int]
    rewards: list[float]
    eval_steps: list[int]
    passed: list[float]
    step_seconds: float | None
    """Median without the first tenth, in which kernels are still compiled."""
    kl_sampler: float | None
    """The largest."""

    @property
    def steps_to_goal(self) -> int | None:
        """First evaluated step at or above ``GOAL``."""
        return next((step for step, passed in zip(self.eval_steps, self.passed) if passed >= GOAL), None)


def read_curve(path: Path) -> Curve:
    """Read ``metrics.jsonl``; a run that was cut may lack it, or end in half a line."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    trained = [row for row in rows if row.get("reward/mean") is not None]
    tested = [row for row in rows if row.get("eval/pass@1") is not None]
    seconds = sorted(row["time/step_s"] for row in trained[len(trained) // 10 :] if "time/step_s" in row)
    kls = [row["policy/kl_sampler"] for row in trained if row.get("policy/kl_sampler") is not None]
    return Curve(
        steps=[row["step"] for row in trained],
        rewards=[row["reward/mean"] for row in trained],
        eval_steps=[row["step"] for row in tested],
        passed=[row["eval/pass@1"] for row in tested],
        step_seconds=seconds[len(seconds) // 2] if seconds else None,
        kl_sampler=max(kls, default=None),
    )


def table(curves: dict[str, Curve], endings: dict[str, str]) -> str:
    """Markdown, a row a run."""
    lines = [
        f"| run | held-out pass@1, first → last | at step | steps to {GOAL:g} | s a step | kl_sampler max | ended |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, curve in curves.items():
        ends = f"{curve.passed[0]:.2f} → {curve.passed[-1]:.2f}" if curve.passed else "–"
        cells = [
            name,
            ends,
            str(curve.steps[-1]) if curve.steps else "–",
            _shown(curve.steps_to_goal, "d"),
            _shown(curve.step_seconds, ".2f"),
            _shown(curve.kl_sampler, ".1e"),
            endings.get(name, "not started"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Reward and held-out pass@1 against the step, a panel a task, a colour a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(name.partition("-")[0] for name in curves))
    figure = Figure(figsize=(6.5 * len(tasks), 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        for number, (name, curve) in enumerate((n, c) for n, c in curves.items() if n.startswith(f"{task}-")):
            colour = f"C{number}"
            axes.plot(curve.steps, curve.rewards, color=colour, alpha=0.3, linewidth=1)
            axes.plot(curve.eval_steps, curve.passed, color=colour, marker="o", label=name.partition("-")[2])
        axes.set_title(f"{task}: held-out pass@1 (dots), reward (thin)")
        axes.set_xlabel("step")
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png")


def run_cells(cells: Sequence[Cell], options: argparse.Namespace, runs: Path) -> dict[str, str]:
    """Run every cell, ``options.parallel`` at once, until all ended or the time is up; how each ended."""
    deadline = time.monotonic() + options.seconds
    waiting, running, endings = list(cells), [], {}
    next_start = 0.0
    try:
        while (waiting or running) and time.monotonic() < deadline:
            if waiting and len(running) < options.parallel and time.monotonic() >= next_start:
                running.append(_start(waiting.pop(0), options, runs))
                next_start = time.monotonic() + options.stagger
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                kill(job)
                endings[job.name] = f"{'done' if job.process.returncode == 0 else 'failed'} after {job.seconds():.0f} s"
                print(f"{job.name}: {endings[job.name]}", flush=True)
                if job.process.returncode != 0:
                    print(job.tail(), flush=True)
            time.sleep(0.5)
    finally:
        for job in running:
            endings[job.name] = f"cut after {job.seconds():.0f} s"
            kill(job)
            print(f"{job.name}: {endings[job.name]}\n{job.tail(3)}", flush=True)
    return endings


def _start(cell: Cell, options: argparse.Namespace, runs: Path) -> Job:
    command = [sys.executable, str(EXAMPLES / TASKS[cell.task]), "--output", str(runs), "--name", cell.name]
    command += ["--weights", str(options.weights), "--steps", str(options.steps), "--algorithm", cell.algorithm]
    command += ["--quantization", cell.quantization, "--engine", options.engine, "--dtype", options.dtype]
    command += ["--evaluate-every", str(options.evaluate_every), "--seed", str(options.seed)]
    command += ["--prompts", str(options.prompts), *(["--eager"] if options.eager else [])]
    if options.gpu_memory_gib:
        command += ["--gpu-memory-gib", str(options.gpu_memory_gib)]
    print(f"{cell.name}: started", flush=True)
    return start(cell.name, command, runs / f"{cell.name}.log")


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for metrics, curves.png and table.md")
    parser.add_argument("--parallel", type=int, default=4, help="runs at once")
    parser.add_argument("--stagger", type=float, default=8.0, help="seconds between two starts")
    parser.add_argument("--seconds", type=float, default=420.0, help="then everything still running is killed")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step, 8 completions each")
    parser.add_argument("--evaluate-every", type=int, default=10)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs: starts sooner, samples slower")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--gpu-memory-gib", type=float, default=12.0, help="of each run; 0: no limit")
    parser.add_argument("--weights", type=Path, default=Path("runs/SmolLM2-135M-Instruct"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "gspo"])
    parser.add_argument("--quantizations", nargs="+", default=["none", "nf4"], choices=["none", "nf4", "fp8"])
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    sys.path.insert(0, str(EXAMPLES))
    from smollm2 import convert

    convert(options.weights)  # once, before several runs would do it at the same time
    cells = [Cell(*choice) for choice in itertools.product(options.tasks, options.algorithms, options.quantizations)]
    options.out.mkdir(parents=True, exist_ok=True)
    runs = Path(tempfile.mkdtemp(prefix="learning-"))
    endings = run_cells(cells, options, runs)
    for cell in cells:
        for source, target in (
            (runs / cell.name / "metrics.jsonl", f"{cell.name}.jsonl"),
            (runs / f"{cell.name}.log", f"{cell.name}.log"),
        ):
            if source.exists():
                shutil.copy(source, options.out / target)
    curves = {cell.name: read_curve(options.out / f"{cell.name}.jsonl") for cell in cells}
    plot(curves, options.out / "curves.png")
    written = table(curves, endings)
    (options.out / "table.md").write_text(written + "\n")
    print(written, flush=True)


if __name__ == "__main__":
    main()
