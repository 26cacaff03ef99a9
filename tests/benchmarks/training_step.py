"""One training step (forward, backward, AdamW; LoRA of rank 16 on every projection) as we do it and as others do.

    python tests/benchmarks/training_step.py                                   # Qwen3-4B's shape, 16 × 1,024 tokens
    python tests/benchmarks/training_step.py --only ours prompts --profile
    python tests/benchmarks/training_step.py --shape qwen3-0.6b --base nf4 --only ours peft unsloth
    python tests/benchmarks/training_step.py --shape tiny --only ours peft     # on a CPU

Every case is a process of its own on the same random weights, tokens and loss; a figure is printed as a JSON line the
moment it is there, and everything again as Markdown at the end. ``gradient error``: of two layers of the shape, from
the same adapter, relative to peft + transformers in float32. ``--seconds`` limits a case, ``--total`` all of them.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import processes
import torch
from random_checkpoint import SHAPES, default_folder, write_in_child
from report import Record, attempt, emit, records, tables
from torch import Tensor
from training_task import DEVICE, Task, relative_error, timed

HERE = Path(__file__).resolve().parent
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "ours": {
        "ours": {},
        "ours, checkpointing": {"activation_checkpointing": True},
        "ours, offload": {"activation_checkpointing": True, "offload_activations": True},
        "ours, reference, checkpointing": {"activation_checkpointing": True, "kernels": "reference"},
    },
    "prompts": {
        "prompt 1024 × 8, shared": {"share_prompts": True},
        "prompt 1024 × 8, not shared": {},
    },
    "peft": {"peft": {}, "peft, checkpointing": {"checkpointing": True}},
    "liger": {"liger": {}, "liger, checkpointing": {"checkpointing": True}},
    "unsloth": {"unsloth": {}},
}
"""Group to case to settings."""
TARGETS = {"training step.tokens_per_s": "ours ≥ 2 × peft, ≥ 1.2 × unsloth", "training step.peak_gib": "≤ ½, ≤ 1 ×"}
PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "cublas")
"""What the names of matrix products have in common."""


class Contender(Protocol):
    """Whoever trains."""

    def step(self) -> None:
        """One whole step."""

    def gradient(self) -> dict[str, Tensor]:
        """Of one step from the adapter that everyone has."""


def task_of(case: str, tiny: bool) -> Task:
    """16,384 tokens, or two prompts of 1,024 with eight completions of 256 each: 20,480."""
    long = case.startswith("prompt")
    if tiny:
        return Task(4, 16, 4, group=2) if long else Task(2, 4, 12)
    return Task(16, 1024, 256, group=8) if long else Task(16, 256, 768)


def small_task(tiny: bool) -> Task:
    """Of the comparison of gradients; some of it can share prompts."""
    return Task(4, 4, 8, group=2) if tiny else Task(4, 32, 96, group=2)


def build(group: str, settings: dict[str, Any], source: Path, task: Task, base: str) -> Contender:
    """The contender over the checkpoint in ``source``."""
    if group in ("ours", "prompts"):
        from training_ours import Ours

        return Ours(source, task, base, settings)
    import training_peers

    return getattr(training_peers, group)(source, task, base, **settings)


def child(options: argparse.Namespace) -> None:
    """One case, in this process: the step, the profile, then the gradient over two layers."""
    case = options.child
    group, settings = next((group, found[case]) for group, found in CASES.items() if case in found)
    task, label = task_of(case, options.shape == "tiny"), f"{case} ({options.base})"
    contender = build(group, settings, options.model, task, options.base)
    emit("training step", label, tokens=task.tokens, **timed(contender.step, task.tokens, options.steps))
    if options.profile and group in ("ours", "prompts"):
        with attempt("profile", label):
            profile(contender.step, label)
    del contender
    gc.collect()
    exact = options.out / "exact.pt"
    if not exact.exists():
        return
    with attempt("gradient", label):
        found = build(group, settings, options.two_layers, small_task(options.shape == "tiny"), options.base).gradient()
        emit("gradient", label, error=relative_error(found, torch.load(exact)))


def write_exact(options: argparse.Namespace) -> None:
    """Gradients of peft + transformers in float32."""
    import training_peers

    task = small_task(options.shape == "tiny")
    found = training_peers.peft(options.two_layers, task, "bf16", dtype=torch.float32).gradient()
    torch.save(found, options.out / "exact.pt")


def profile(step: Callable[[], None], label: str) -> None:
    """The twelve kernels that take longest, and the share of matrix products."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    kind = torch.autograd.DeviceType.CUDA if DEVICE.type == "cuda" else torch.autograd.DeviceType.CPU
    activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
    with profiler(activities=[activity]) as found:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    events = [event for event in found.key_averages() if event.device_type == kind]
    times = {event.key: _microseconds(event) for event in events}
    whole = sum(times.values())
    products = sum(value for name, value in times.items() if any(mark in name.lower() for mark in PRODUCTS))
    emit("profile", label, kernels_ms=whole / 1e3, products_pct=100 * products / whole)
    counts = {event.key: event.count for event in events}
    for name in sorted(times, key=lambda name: -times[name])[:12]:
        emit("profile", name[:90], calls=counts[name], kernels_ms=times[name] / 1e3, pct=100 * times[name] / whole)


def _microseconds(event: Any) -> float:
    return event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total


def measure(options: argparse.Namespace) -> list[Record]:
    """Run every case, one after the other; what was measured, and what went wrong."""
    deadline = time.monotonic() + options.total
    found: list[Record] = []
    if options.base == "bf16" and options.gradients:
        found += run("exact", ["--exact"], options, deadline)
    for group in options.only:
        for case in CASES[group]:
            if not options.cases or case in options.cases:
                found += run(case, ["--child", case, *(["--profile"] if options.profile else [])], options, deadline)
    return found


def run(name: str, arguments: Sequence[str], options: argparse.Namespace, deadline: float) -> list[Record]:
    """One child; an ending that is not success becomes a record."""
    limit = min(options.seconds, deadline - time.monotonic())
    if limit < 10:
        print(f"{name}: skipped, no time left", flush=True)
        return [{"measurement": "not finished", "case": name, "ending": "skipped: no time left"}]
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--base", options.base, "--out"]
    command += [str(options.out), "--model", str(options.model), "--shape", options.shape, "--steps"]
    command += [str(options.steps)]
    environment = {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])}
    job = processes.start(name, command, options.out / f"{name.replace(' ', '_').replace(',', '')}.log", environment)
    status = processes.run(job, limit)
    mine = records(job.log.read_text(errors="replace"))
    for record in mine:
        print(record, flush=True)
    if status != 0:
        ending = f"cut after {limit:.0f} s" if status is None else last_line(job.tail(40))
        print(f"{name}: {ending}; the end of its log:\n{job.tail(25)}", flush=True)
        mine.append({"measurement": "not finished", "case": name, "ending": ending})
    print(f"{name}: {job.seconds():.0f} s", flush=True)
    return mine


def last_line(tail: str) -> str:
    """The error, where the log ends in one."""
    lines = [line for line in tail.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="groups of cases")
    every = [case for found in CASES.values() for case in found]
    parser.add_argument("--cases", nargs="+", choices=every, help="of these groups only so many")
    parser.add_argument("--shape", default="qwen3-4b", choices=list(SHAPES))
    parser.add_argument("--base", default="bf16", choices=["bf16", "nf4", "fp8"])
    parser.add_argument("--model", type=Path, help="folder of the checkpoint; written there if it is not there yet")
    parser.add_argument("--out", type=Path, default=Path("training_step"), help="folder for logs and tables")
    parser.add_argument("--steps", type=int, default=5, help="timed ones, after two others")
    parser.add_argument("--profile", action="store_true", help="of ours: the kernels that take longest")
    parser.add_argument("--no-gradients", dest="gradients", action="store_false", help="leave the comparison out")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit of a case")
    parser.add_argument("--total", type=float, default=570.0, help="limit of them all")
    parser.add_argument("--child", choices=every, help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.model is None:
        options.model = default_folder(options.shape)
    options.model, options.out = options.model.resolve(), options.out.resolve()
    options.two_layers = options.model.with_name(f"{options.model.name}-2-layers")
    return options


def main() -> None:
    options = parse()
    if options.child:
        child(options)
        return
    if options.exact:
        write_exact(options)
        return
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "exact.pt").unlink(missing_ok=True)
    dtype = "float32" if options.shape == "tiny" else "bfloat16"
    write_in_child(options.model, options.shape, dtype)
    if options.base == "bf16" and options.gradients:
        write_in_child(options.two_layers, options.shape, dtype, 2)
    print(f"checkpoints: {time.monotonic() - began:.0f} s", flush=True)
    written = tables(measure(options), TARGETS)
    (options.out / "tables.md").write_text(written + "\n")
    print(written, flush=True)


if __name__ == "__main__":
    main()
