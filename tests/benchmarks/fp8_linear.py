"""Microseconds of one fp8 linear layer in the shapes of Qwen3-4B: our kernel against what else torch can do.

Weights lie in so many copies that L2 holds none of them when its turn comes, as between two decoding steps; calls are
replayed from a CUDA graph. Nothing is timed before its result has been compared with float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels.fp8_linear import fp8_linear
from posttrain.kernels.reference import dequantize_fp8
from posttrain.kernels.split_k import LOCKS
from posttrain.trainer.quantized import FP8_MAX, round_to_fp8

SHAPES = {"qkv": (6144, 2560), "o": (2560, 4096), "gate_up": (19456, 2560), "down": (2560, 9728)}
ROWS = (1, 8, 64, 256)
ROTATED = 256 * 2**20
"""Bytes of weights between two uses of the same one."""
REPEATS = 9


def main() -> None:
    """Check, then time every shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    print("| layer | rows | ours µs | GB/s | ÷ dequantize | ÷ bf16 | ÷ W8A8 |\n|---|---|---|---|---|---|---|")
    for name in chosen.shapes:
        for rows in chosen.rows:
            measure(name, rows)


@torch.inference_mode()
def measure(name: str, rows: int) -> None:
    """One line of the table; the ratios are ours by theirs, below 1 where ours is faster."""
    outputs, inputs = SHAPES[name]
    generator = torch.Generator("cuda").manual_seed(rows)
    draw = {"generator": generator, "device": "cuda"}
    x = torch.randn(rows, inputs, **draw).bfloat16()
    dense = torch.randn(outputs, inputs, **draw)
    scale = (dense.abs().amax() / FP8_MAX).reshape(1)
    weight = (dense / scale).to(torch.float8_e4m3fn)
    del dense
    locks = torch.zeros(LOCKS, dtype=torch.int32, device="cuda")
    check(x, weight, scale, locks)

    copies = [weight.clone() for _ in range(-(-ROTATED // weight.nbytes))]
    wide = [dequantize_fp8(weight, scale, torch.bfloat16) for _ in range(-(-ROTATED // (2 * weight.nbytes)))]
    bits, token_scale = round_to_fp8(x, inputs)
    bits, token_scale = bits.view(rows, inputs), token_scale.view(rows, 1)
    row_scale = scale.expand(1, outputs).contiguous()

    ours = time_of(lambda w: fp8_linear(x, w, scale, None, locks), copies)
    theirs = {
        "dequantize": time_of(lambda w: F.linear(x, dequantize_fp8(w, scale, torch.bfloat16)), copies),
        "bf16": time_of(lambda w: F.linear(x, w), wide),
        # the product alone: rounding x to fp8 comes on top
        "W8A8": time_of(
            lambda w: torch._scaled_mm(bits, w.t(), token_scale, row_scale, out_dtype=torch.bfloat16), copies
        ),
    }
    ratios = " | ".join(f"{ours / other:.2f}" for other in theirs.values())
    print(f"| {name} | {rows} | {ours:.1f} | {weight.nbytes / ours / 1e3:.0f} | {ratios} |", flush=True)


def check(x: Tensor, weight: Tensor, scale: Tensor, locks: Tensor) -> None:
    """At most twice torch's own error; the same bits every time; the locks as they were."""
    wide = dequantize_fp8(weight, scale, torch.bfloat16)
    exact = x.double() @ (weight.double() * scale.double()).T
    theirs = (F.linear(x, wide).double() - exact).abs().max().item()
    first = fp8_linear(x, weight, scale, None, locks)
    ours = (first.double() - exact).abs().max().item()
    assert ours <= 2 * theirs, f"wrong by {ours:.3g}, torch by {theirs:.3g}"
    for _ in range(20):
        assert torch.equal(fp8_linear(x, weight, scale, None, locks), first), "not the same every time"
    assert not locks.any(), "a lock was left"


def time_of(call: Callable[[Tensor], Tensor], weights: list[Tensor]) -> float:
    """Median microseconds of one call, over all weights in turn."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            call(weight)
    graph.replay()
    seconds = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / len(weights))
    return median(seconds) * 1e3


if __name__ == "__main__":
    main()
