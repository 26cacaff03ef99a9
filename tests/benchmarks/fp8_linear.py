"""Microseconds of one fp8 linear layer in the shapes of Qwen3-4B: our kernel against what else torch can do.

Weights lie in so many copies that L2 holds none of them when its turn comes, as between two decoding steps; calls are
replayed from a CUDA graph. Nothing is timed before its result has been compared with float64.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
import triton
from layer_timing import SHAPES, copies_of, copy_bandwidth, time_of
from torch import Tensor

from posttrain.kernels import fp8, fp8_linear, reference
from posttrain.kernels.split_k import LOCKS
from posttrain.trainer.quantized import FP8_MAX, round_to_fp8

ROWS = (1, 8, 16, 32, 64, 128, 256)
BFLOAT16 = torch.bfloat16


def main() -> None:
    """Check, then time every shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qkv", "o", "gate_up", "down"])
    parser.add_argument("--sweep", type=int, metavar="ROWS", help="look for tiles instead")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    with torch.inference_mode():
        if chosen.sweep:
            sweep_tiles(chosen.sweep)
            return
        peak = copy_bandwidth()
        print(f"copy: {peak / 1e3:.0f} GB/s\n")
        columns = "layer | rows | ours µs | of copy bandwidth | ÷ dequantize | ÷ bf16 | ÷ W8A8"
        print(f"| {columns} |\n|" + "---|" * 7)
        for name in chosen.shapes:
            for rows in chosen.rows:
                measure(name, rows, peak)
        print("\n| dequantize | ours µs | of copy bandwidth | ÷ torch |\n|---|---|---|---|")
        for name in chosen.shapes:
            dequantization(name, peak)


def drawn(name: str) -> tuple[Tensor, Tensor]:
    """A random weight of that layer, and its scale."""
    dense = torch.randn(SHAPES[name], generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    scale = (dense.abs().amax() / FP8_MAX).reshape(1)
    return (dense / scale).to(torch.float8_e4m3fn), scale


def measure(name: str, rows: int, peak: float) -> None:
    """One line of the table; the ratios are ours by theirs, below 1 where ours is faster."""
    outputs, inputs = SHAPES[name]
    x = torch.randn(rows, inputs, device="cuda").to(BFLOAT16)
    weight, scale = drawn(name)
    locks = torch.zeros(LOCKS, dtype=torch.int32, device="cuda")
    check(x, weight, scale, locks)

    copies = [weight.clone() for _ in range(copies_of(weight.nbytes))]
    wide = [fp8.dequantize_fp8(weight, scale, BFLOAT16) for _ in range(copies_of(2 * weight.nbytes))]
    bits, token_scale = round_to_fp8(x, inputs)
    bits, token_scale = bits.view(rows, inputs), token_scale.view(rows, 1)
    row_scale = scale.expand(1, outputs).contiguous()

    ours = time_of(lambda w: fp8_linear.fp8_linear(x, w, scale, None, locks), copies)
    theirs = [
        time_of(lambda w: F.linear(x, fp8.dequantize_fp8(w, scale, BFLOAT16)), copies),
        time_of(lambda w: F.linear(x, w), wide),
        # the product alone: rounding x to fp8 comes on top
        time_of(lambda w: torch._scaled_mm(bits, w.t(), token_scale, row_scale, out_dtype=BFLOAT16), copies),
    ]
    ratios = " | ".join(f"{ours / other:.2f}" for other in theirs)
    print(f"| {name} | {rows} | {ours:.1f} | {weight.nbytes / ours / peak:.0%} | {ratios} |", flush=True)


def dequantization(name: str, peak: float) -> None:
    """One line of the second table."""
    weight, scale = drawn(name)
    found = fp8.dequantize_fp8(weight, scale, BFLOAT16)
    assert torch.equal(found, reference.dequantize_fp8(weight, scale, BFLOAT16)), "other bits"
    copies = [weight.clone() for _ in range(copies_of(weight.nbytes))]
    ours = time_of(lambda w: fp8.dequantize_fp8(w, scale, BFLOAT16), copies)
    theirs = time_of(lambda w: reference.dequantize_fp8(w, scale, BFLOAT16), copies)
    print(
        f"| {name} | {ours:.1f} | {(weight.nbytes + found.nbytes) / ours / peak:.0%} | {ours / theirs:.2f} |",
        flush=True,
    )


def sweep_tiles(rows: int) -> None:
    """The best tiles for that many rows: microseconds of every layer, and of a decoder layer."""
    locks = torch.zeros(LOCKS, dtype=torch.int32, device="cuda")
    layers = {}
    for name in ("qkv", "o", "gate_up", "down"):
        weight, scale = drawn(name)
        x = torch.randn(rows, SHAPES[name][1], device="cuda").to(BFLOAT16)
        layers[name] = x, scale, [weight.clone() for _ in range(copies_of(weight.nbytes))]
    most = max(16, 1 << (rows - 1).bit_length())
    found = []
    for block_m, (block_n, warps), block_k, stages, programs in itertools.product(
        sorted({most, max(16, most // 2)}), ((64, 4), (128, 4), (128, 8)), (64, 128), (3, 5), (1, 2, 4)
    ):
        fp8_linear.TILES = (fp8_linear._Tiles(rows, block_m, block_n, block_k, warps, stages, programs),)
        fp8_linear.KERNEL_ROWS = rows
        try:
            times = [
                time_of(lambda w, x=x, scale=scale: fp8_linear.fp8_linear(x, w, scale, None, locks), copies, 3)
                for x, scale, copies in layers.values()
            ]
        except triton.runtime.errors.OutOfResources:
            continue
        found.append((sum(times), times, fp8_linear.TILES[0]))
    print(f"| {rows} rows | together µs | " + " | ".join(layers) + " |\n|" + "---|" * 6)
    for total, times, tiles in sorted(found)[:8]:
        print(f"| {tuple(tiles)[1:]} | {total:.1f} | " + " | ".join(f"{time:.1f}" for time in times) + " |")


def check(x: Tensor, weight: Tensor, scale: Tensor, locks: Tensor) -> None:
    """At most twice torch's own error; the same bits every time; the locks as they were."""
    wide = reference.dequantize_fp8(weight, scale, BFLOAT16)
    exact = x.double() @ (weight.double() * scale.double()).T
    theirs = (F.linear(x, wide).double() - exact).abs().max().item()
    first = fp8_linear.fp8_linear(x, weight, scale, None, locks)
    ours = (first.double() - exact).abs().max().item()
    assert ours <= 2 * theirs, f"wrong by {ours:.3g}, torch by {theirs:.3g}"
    for _ in range(20):
        assert torch.equal(fp8_linear.fp8_linear(x, weight, scale, None, locks), first), "not the same every time"
    assert not locks.any(), "a lock was left"


if __name__ == "__main__":
    main()
