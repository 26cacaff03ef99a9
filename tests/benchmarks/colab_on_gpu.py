"""The Colab notebook on another GPU, within a T4's limits: 15 GiB, float16, no fp8.

    python tests/benchmarks/colab_on_gpu.py [--model FOLDER] [--data FOLDER] [--steps 4] [--seconds 500]

Runs the notebook's code cells in order, in one process with a running event loop, as a kernel does. Without ``--model``
they get random weights in the shape of Qwen3-0.6B and a character tokenizer; without ``--data`` a few sums in GSM8K's
form. The notebook's ``gpu_memory_gib`` bounds the KV cache and, by torch's limit for a process, the trainer; the
driver's figure for the whole GPU is watched beside it: what the run adds must stay below 15 GiB, or the exit status is
1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from random_checkpoint import SHAPES, write_in_child

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "colab_grpo.ipynb"
GIB = 2**30
T4_GIB = 15.0


def code_cells(notebook: Path = NOTEBOOK) -> list[str]:
    """Source of every code cell, in order."""
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def execute(cells: Sequence[str]) -> dict[str, Any]:
    """Run the cells in one namespace inside a running event loop; returns the namespace."""
    namespace: dict[str, Any] = {"__name__": "notebook"}

    async def kernel() -> None:
        for number, source in enumerate(cells, 1):
            began = time.perf_counter()
            exec(compile(source, f"<cell {number}>", "exec"), namespace)
            print(f"cell {number}: {time.perf_counter() - began:.1f} s", flush=True)

    asyncio.run(kernel())
    return namespace


def write_sums(folder: Path, rows: int = 256) -> Path:
    """Sums as GSM8K writes its problems, for a machine without the dataset."""
    draw = random.Random(0)
    for split in ("train", "test"):
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(rows):
                a, b = draw.randrange(100), draw.randrange(100)
                answer = f"There are {a}+{b}=<<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}"
                row = {"question": f"Ann has {a} apples and gets {b} more. How many are there?", "answer": answer}
                file.write(json.dumps(row) + "\n")
    return folder


class MemoryWatch:
    """What the driver says is in use on the first GPU, from ``__enter__`` on, above what was there before."""

    def __enter__(self) -> MemoryWatch:
        self.before, self.peak = self._used(), 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self.peak = max(self.peak, self._used() - self.before)

    @staticmethod
    def _used() -> float:
        from posttrain.rl.machine import gpus

        found = gpus()
        return (found[0].total - found[0].free) / GIB if found and found[0].total and found[0].free else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a local model; by default random weights")
    parser.add_argument("--shape", default="qwen3-0.6b", choices=list(SHAPES), help="of the random weights")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--quantization", default="nf4", choices=["none", "nf4"])
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="colab-"))
    model = options.model or write_in_child(work / "model", options.shape, "float16")
    os.environ |= {
        "MODEL": str(model.resolve()),
        "DATA": str((options.data or write_sums(work)).resolve()),
        "STEPS": str(options.steps),
        "MAX_TOKENS": str(options.max_tokens),
        "ENGINE": options.engine,
        "DTYPE": options.dtype,
        "QUANTIZATION": options.quantization,
        "MPLBACKEND": "agg",
    }
    os.chdir(work)
    with MemoryWatch() as memory:
        namespace = execute(code_cells())
    metrics = namespace["result"].metrics
    rewards = [row["reward/mean"] for row in metrics if "reward/mean" in row]
    figures = {
        "steps": len(rewards),
        "reward_first": rewards[0],
        "reward_last": rewards[-1],
        "kl_sampler_max": max(row.get("policy/kl_sampler", 0.0) for row in metrics),
        "step_s": [round(row["time/step_s"], 2) for row in metrics if "time/step_s" in row],
        "peak_gib_on_the_gpu": round(memory.peak, 2),
    }
    print(json.dumps(figures), flush=True)
    if len(rewards) != options.steps:
        sys.exit(f"only {len(rewards)} of {options.steps} steps were trained")
    if memory.peak > T4_GIB:
        sys.exit(f"{memory.peak:.2f} GiB at the peak is more than a T4 has to give ({T4_GIB:g})")


if __name__ == "__main__":
    main()
