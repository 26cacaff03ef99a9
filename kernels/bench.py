"""Every kernel beside torch, torch.compile, Liger, bitsandbytes and Unsloth: first whether it is right, then how fast.

    python -m posttrain.kernels.bench --seconds 240 --markdown kernels.md
    python -m posttrain.kernels.bench --only rms_norm rope --without compile unsloth

A row is printed the moment it is there. No time is reported where the error, relative to float32, is more than twice
that of plain torch in the same type. Times are medians on the GPU, L2 flushed before each, launches queued ahead;
"%" is the share of what this GPU reaches in the same run: copying, or one large bfloat16 product by cuBLAS. "extra MiB"
is the peak of memory beyond the inputs; results and gradients count. Unsloth patches what it imports, so it runs last,
in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from posttrain.kernels.benchmark import elementwise, products, quantized
from posttrain.kernels.benchmark.case import SIZES, Case, Sizes
from posttrain.kernels.benchmark.measure import Bench, Ceiling, Row, measure_ceiling

OPS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "rms_norm": elementwise.rms_norms,
    "rope": elementwise.ropes,
    "glu": elementwise.glus,
    "token_logprobs": products.token_logprobs,
    "lora": products.loras,
    "nf4": quantized.nf4s,
    "fp8": quantized.fp8s,
    "attention": products.attentions,
}
OTHERS = ("torch", "compile", "two products", "cublas", "liger", "bitsandbytes", "varlen_attn", "unsloth")
COLUMNS = ("op", "shape", "pass", "by", "error ÷ torch's", "µs", "÷ ours", "rate", "%", "extra MiB", "wanted")


class Table:
    """The rows as Markdown, times beside those of our own kernel."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._ours: dict[tuple[str, str, str], float] = {}

    def head(self, ceiling: Ceiling) -> str:
        """What the shares are shares of, and the names of the columns."""
        speeds = f"copy {ceiling.bandwidth / 1e12:.2f} TB/s, bfloat16 products {ceiling.products / 1e12:.0f} TFLOP/s"
        self.lines = [speeds, "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        return "\n".join(self.lines)

    def add(self, row: Row) -> str:
        """The row's line; ours comes before those it is compared with."""
        key = (row.op, row.shape, row.direction)
        if row.by == "ours" and row.seconds is not None:
            self._ours[key] = row.seconds
        figures = [row.note, "", "", "", "", ""] if row.note else self._figures(row, self._ours.get(key))
        cells = [row.op, row.shape, row.direction, row.by, *figures, row.wanted]
        self.lines.append(f"| {' | '.join(cells)} |")
        return self.lines[-1]

    @staticmethod
    def _figures(row: Row, ours: float | None) -> list[str]:
        def cell(value: float | None, form: str, factor: float = 1.0) -> str:
            return "" if value is None else format(value * factor, form)

        ratio = None if ours is None or row.seconds is None else row.seconds / ours
        times = [cell(row.error, ".2f"), cell(row.seconds, ".1f", 1e6), cell(ratio, ".2f")]
        return [*times, row.rate, cell(row.share, ".0f", 100), cell(row.extra, ".0f")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--without", nargs="+", choices=OTHERS, default=[])
    parser.add_argument("--seconds", type=float, default=240.0, help="after that, what is left is skipped")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--sizes", choices=SIZES, default="full", help="tiny: on a CPU, with TRITON_INTERPRET=1")
    parser.add_argument("--unsloth-child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(arguments)
    began = time.monotonic()
    sizes = SIZES[options.sizes]
    if sizes.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU; --sizes tiny with TRITON_INTERPRET=1 tries everything out on a CPU")
    device = torch.device(sizes.device)
    if options.unsloth_child:
        importlib.import_module("unsloth")  # before everything that it patches
    with_unsloth = "unsloth" not in options.without and not options.unsloth_child and device.type == "cuda"
    # the child imports and compiles for itself, and gets what is left
    seconds = options.seconds * (0.7 if with_unsloth else 1.0)
    bench = Bench(device, measure_ceiling(device), began + seconds, options.without, options.unsloth_child)
    if options.unsloth_child:
        for row in _rows(bench, sizes, options.only):
            _say(json.dumps(row))
        return
    table = Table()
    _say(table.head(bench.ceiling))
    for row in _rows(bench, sizes, options.only):
        _say(table.add(row))
    if with_unsloth:
        for row in _unsloth_rows(options, options.seconds - (time.monotonic() - began)):
            _say(table.add(row))
    if options.markdown:
        options.markdown.write_text("\n".join(table.lines) + "\n")


def _rows(bench: Bench, sizes: Sizes, ops: Sequence[str]) -> Iterator[Row]:
    for op in ops:
        for case in OPS[op](sizes):
            yield from bench.rows(case)
            torch.compiler.reset()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


def _unsloth_rows(options: argparse.Namespace, seconds: float) -> Iterator[Row]:
    """Of the child, as they come; then what went wrong, if anything did."""
    failed = Row("all", "", "", "unsloth")
    if seconds < 15:
        yield failed._replace(note="skipped: no time left")
        return
    command = [sys.executable, "-m", "posttrain.kernels.bench", "--unsloth-child", "--seconds", str(seconds - 10)]
    command += ["--only", *options.only, "--sizes", options.sizes]
    with tempfile.TemporaryFile("w+") as complaints:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True)
        alarm = threading.Timer(seconds, child.kill)
        alarm.start()
        assert child.stdout is not None
        for text in child.stdout:
            if text.startswith('["'):
                yield Row(*json.loads(text))
        status = child.wait()
        alarm.cancel()
        if status:
            complaints.seek(0)
            last = (complaints.read().strip() or f"ended with {status}").splitlines()[-1]
            yield failed._replace(note=last[:160].replace("|", "/"))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
