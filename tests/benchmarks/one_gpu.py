"""What one GPU with one copy of the weights can do, measured on random weights in the shape of Qwen3-4B.

    python tests/benchmarks/one_gpu.py --only pair       # start, memory, storage, sleep, agreement, publishing, cycles
    python tests/benchmarks/one_gpu.py --only decode     # tokens a second: no LoRA, dense, slots
    python tests/benchmarks/one_gpu.py --only step       # one training step by phase, with a picture

Each case (a base, and what else a measurement varies) is a process of its own with a time limit; a figure is printed as
a JSON line the moment it is there, and everything again as Markdown tables at the end. ``--seconds`` is the limit of a
case, ``--total`` that of them all.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import processes
from random_checkpoint import SHAPES, default_folder, write_in_child
from report import Record, emit, records, short, tables

HERE = Path(__file__).resolve().parent
GIB = 2**30
MEASUREMENTS = ("pair", "decode", "step")
TARGETS = {
    "trainer memory.extra_less_context_pct": "< 3",
    "storage.checksums_equal": "True",
    "storage.flip_seen": "True",
    "sleep.returned_pct": "≥ 95",
    "sleep.wake_s": "< 0.5",
    "agreement.mean_abs": "bf16, nf4 < 0.02, fp8 < 0.05",
    "publish.median_ms": "< 100",
    "cycles.drift_mib": "< 50",
    "cycles.greedy_unchanged": "True",
}
"""Beside the figures' names in the tables."""
STARTED = re.compile(r"vLLM started in ([\d.]+) s: (.*)")
"""What our engine logs of its start: the whole, then every phase."""
INSIDE = {
    "of it torch.compile": re.compile(r"torch\.compile took ([\d.]+) s"),
    "of it graphs": re.compile(r"Graph capturing finished in ([\d.]+) secs"),
}
"""What vLLM logs of two of them."""


def cases(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of every child to run."""
    for base in options.bases:
        if "pair" in options.only:
            yield f"pair {base}", ["pair", "--base", base]
    for base in options.bases:
        for lora in options.loras if "decode" in options.only else ():
            for place in options.places:
                yield f"decode {base} {lora} {place}", ["decode", "--base", base, "--lora", lora, "--place", place]
    for base in options.bases:
        for staleness in options.staleness if "step" in options.only else ():
            yield f"step {base} {staleness}", ["step", "--base", base, "--max-staleness", str(staleness)]


def measure(options: argparse.Namespace) -> list[Record]:
    """Run every case, one after the other; what was measured, and what went wrong."""
    found: list[Record] = []
    deadline = time.monotonic() + options.total
    for name, arguments in cases(options):
        limit = min(options.seconds, deadline - time.monotonic())
        if limit < 20:
            print(f"{name}: no time left", flush=True)
            continue
        command = [sys.executable, str(Path(__file__).resolve()), "--child", *arguments, "--model", str(options.model)]
        command += ["--kv-cache-gib", str(options.kv_cache_gib), "--cycles", str(options.cycles)]
        command += ["--out", str(options.out), *(["--eager"] if options.eager else []), "--parts", *options.parts]
        environment = {
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RAY_DEDUP_LOGS": "0",
        }
        job = processes.start(name, command, options.out / f"{name.replace(' ', '_')}.log", environment)
        status = processes.run(job, limit)
        text = job.log.read_text(errors="replace")
        mine = [*records(text), *start_phases(name, text)]
        for record in mine:
            print(record, flush=True)
        if status != 0:
            ending = f"cut after {limit:.0f} s" if status is None else f"exit status {status}"
            print(f"{name}: {ending}; the end of its log:\n{job.tail(25)}", flush=True)
            mine.append({"measurement": "not finished", "case": name, "ending": ending})
        print(f"{name}: {job.seconds():.0f} s", flush=True)
        found += mine
    return found


def start_phases(name: str, log: str) -> list[Record]:
    """Seconds of each phase of an engine's start, out of a log."""
    started = STARTED.search(log)
    if started is None:
        return []
    phases = [phase.rpartition(" ") for phase in started[2].strip().split(", ")]
    found = {title: match for title, pattern in INSIDE.items() if (match := pattern.search(log))}
    return [
        {
            "measurement": "engine start, seconds",
            "case": name,
            "whole": float(started[1]),
            **{phase: float(seconds) for phase, _, seconds in phases},
            **{title: float(match[1]) for title, match in found.items()},
        }
    ]


def child(options: argparse.Namespace) -> None:
    """One case, in this process."""
    kind, cache = options.child, int(options.kv_cache_gib * GIB)
    try:
        if kind == "pair":
            import pair

            parts = tuple(options.parts)
            pair.run(pair.Settings(options.model, options.base, cache, options.cycles, options.eager, parts))
        elif kind == "decode":
            import decode

            here = options.place == "in-process"
            decode.run(decode.Settings(options.model, options.base, options.lora, here, cache, options.eager))
        else:
            import step

            step.run(
                step.Settings(
                    options.model,
                    options.base,
                    options.max_staleness,
                    options.out,
                    kv_cache_gib=options.kv_cache_gib,
                    eager=options.eager,
                )
            )
    except Exception as error:
        emit(kind, f"{options.base} {options.lora if kind == 'decode' else ''}".strip(), error=short(error))
        raise


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(MEASUREMENTS), choices=MEASUREMENTS)
    parser.add_argument("--bases", nargs="+", default=["bf16", "nf4", "fp8"], choices=["bf16", "nf4", "fp8"])
    parser.add_argument("--loras", nargs="+", default=["none", "dense", "slots"], choices=["none", "dense", "slots"])
    parser.add_argument("--places", nargs="+", default=["in-process"], choices=["in-process", "subprocess"])
    parser.add_argument("--staleness", nargs="+", type=int, default=[0, 1], help="of a step: 0 in turns, 1 overlapped")
    parser.add_argument("--shape", default="qwen3-4b", choices=list(SHAPES))
    parser.add_argument("--model", type=Path, help="folder of the checkpoint; written there if it is not there yet")
    parser.add_argument("--out", type=Path, default=Path("one_gpu"), help="folder for logs, figures and pictures")
    parser.add_argument("--kv-cache-gib", type=float, default=20.0)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs")
    parts = ["storage", "sleep", "agreement", "publish", "projection", "cycles"]
    parser.add_argument("--parts", nargs="*", default=[], choices=parts, help="of a pair; all by default")
    parser.add_argument("--seconds", type=float, default=240.0, help="limit of a case")
    parser.add_argument("--total", type=float, default=570.0, help="limit of them all")
    inner = parser.add_argument_group("one case, in this process")
    inner.add_argument("--child", choices=MEASUREMENTS)
    inner.add_argument("--base", default="bf16")
    inner.add_argument("--lora", default="none")
    inner.add_argument("--place", default="in-process")
    inner.add_argument("--max-staleness", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.model is None:
        options.model = default_folder(options.shape)
    options.model, options.out = options.model.resolve(), options.out.resolve()
    return options


def main() -> None:
    options = parse()
    if options.child:
        child(options)
        return
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    write_in_child(options.model, options.shape)
    print(f"checkpoint: {time.monotonic() - began:.0f} s", flush=True)
    written = tables(measure(options), TARGETS)
    (options.out / "tables.md").write_text(written + "\n")
    print(written, flush=True)


if __name__ == "__main__":
    main()
