"""Microseconds of one nf4 linear layer in the shapes of Qwen3-4B: our kernel against bitsandbytes, cuBLAS over a
bfloat16 weight, and dequantizing first; then the dequantization alone. Nothing is timed before its result is compared.

``--quick``: four layers at 1, 16 and 64 rows. ``--sweep ROWS ...`` looks for tiles instead and prints lines for
``nf4.TILES``; ``--sweep-dequantize`` for the size of that kernel's programs.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
import triton
from layer_timing import SHAPES, copies_of, copy_bandwidth, time_of
from torch import Tensor

from posttrain.kernels import nf4, reference
from posttrain.kernels.split_k import LOCKS

ROWS = (1, 4, 8, 16, 32, 64, 128, 256)
PARTS = {"qkv": (4096, 1024, 1024), "gate_up": (9728, 9728)}
"""Rows of the parts that vLLM multiplies one by one with bitsandbytes."""
BFLOAT16 = torch.bfloat16
LAYERS = ("qkv", "o", "gate_up", "down")
CHOICES = {
    8: ([(64, 1, 2, 5), (64, 2, 2, 4), (128, 1, 4, 5), (64, 1, 4, 5), (32, 2, 1, 5)], (4, 8, 12)),
    16: ([(64, 1, 2, 5), (64, 2, 2, 4), (32, 1, 2, 5), (32, 2, 1, 5), (128, 1, 4, 4)], (4, 8, 12)),
    32: ([(64, 1, 2, 4), (32, 2, 1, 4), (64, 1, 4, 4), (128, 1, 4, 4), (128, 1, 8, 4)], (2, 4, 8)),
    64: ([(128, 1, 4, 4), (128, 1, 8, 4), (128, 2, 8, 3), (64, 1, 4, 4), (64, 2, 4, 3)], (2, 3, 5)),
    128: ([(128, 1, 8, 3), (128, 2, 8, 3), (64, 1, 4, 3)], (1, 2, 3)),
}
"""For each ``block_m``: outputs, blocks, warps and stages; and how many programs."""


def main() -> None:
    """Check, then time every shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sweep", type=int, nargs="+", metavar="ROWS")
    parser.add_argument("--sweep-dequantize", action="store_true")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    with torch.inference_mode():
        if chosen.sweep:
            layers = [Layer(name) for name in LAYERS]
            for rows in chosen.sweep:
                sweep_tiles(rows, layers)
        elif chosen.quick:
            quick()
        elif chosen.sweep_dequantize:
            sweep_dequantization()
        else:
            tables(chosen.shapes, chosen.rows)


def tables(names: list[str], numbers: list[int]) -> None:
    """Both tables; ratios are ours by theirs, below 1 where ours is faster."""
    peak = copy_bandwidth()
    print(f"copy: {peak / 1e3:.0f} GB/s\n")
    columns = (
        "layer | rows | ours µs | of copy bandwidth | ÷ bitsandbytes | ÷ that in vLLM's parts | ÷ bf16 | ÷ dequantize"
    )
    print(f"| {columns} |\n|" + "---|" * 8)
    for name in names:
        layer = Layer(name)
        for rows in numbers:
            layer.product(rows, peak)
    print("\n| dequantize | ours µs | of copy bandwidth | ÷ bitsandbytes |\n|---|---|---|---|")
    for name in names:
        Layer(name).dequantization(peak)


def quick() -> None:
    """The layers of a decoder, against the two products that they replace."""
    print("| layer | rows | ours µs | bf16 µs | bitsandbytes µs | bf16 ÷ ours | bitsandbytes ÷ ours |\n|" + "---|" * 7)
    for name in LAYERS:
        layer = Layer(name)
        for rows in (1, 16, 64):
            x = torch.randn(rows, layer.shape[1], device="cuda").to(BFLOAT16)
            layer.check(x)
            ours = time_of(lambda held, layer=layer, x=x: layer.ours(x, held), layer.copies)
            wide = time_of(lambda held, x=x: F.linear(x, held), layer.wide)
            theirs = time_of(lambda held, layer=layer, x=x: layer.theirs(x, held), layer.copies)
            ratios = f"{wide / ours:.2f} | {theirs / ours:.2f}"
            print(f"| {name} | {rows} | {ours:.1f} | {wide:.1f} | {theirs:.1f} | {ratios} |", flush=True)


class Layer:
    """One shape, its weight in as many copies as no cache holds."""

    def __init__(self, name: str) -> None:
        self.name, self.shape = name, SHAPES[name]
        generator = torch.Generator("cuda").manual_seed(0)
        dense = torch.randn(self.shape, generator=generator, device="cuda").to(BFLOAT16)
        packed, self.state = bitsandbytes.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=False)
        self.bytes = packed.nbytes + self.state.absmax.nbytes
        self.copies = [(packed.clone(), self.state.absmax.clone()) for _ in range(copies_of(self.bytes))]
        self.wide = [dense.clone() for _ in range(copies_of(dense.nbytes))]
        self.locks = torch.zeros(LOCKS, dtype=torch.int32, device="cuda")

    def ours(self, x: Tensor, held: tuple[Tensor, Tensor]) -> Tensor:
        """The kernel."""
        return nf4.nf4_linear(x, *held, self.shape, locks=self.locks)

    def theirs(self, x: Tensor, held: tuple[Tensor, Tensor], rows: slice | None = None) -> Tensor:
        """bitsandbytes, over all rows of the weight or some."""
        state: Any = self.state
        packed, absmax = held
        if rows is not None:
            inputs = self.shape[1]
            packed = packed[rows.start * inputs // 2 : rows.stop * inputs // 2]
            absmax = absmax[rows.start * inputs // 64 : rows.stop * inputs // 64]
        shape = torch.Size((2 * packed.numel() // self.shape[1], self.shape[1]))
        part = bitsandbytes.functional.QuantState(
            absmax, shape=shape, code=state.code, blocksize=64, quant_type="nf4", dtype=BFLOAT16
        )
        return bitsandbytes.matmul_4bit(x, packed.t(), part)

    def in_parts(self, x: Tensor, held: tuple[Tensor, Tensor]) -> Tensor:
        """As vLLM calls bitsandbytes: a product for each part, copied to its place."""
        y, start = x.new_empty(x.shape[0], self.shape[0]), 0
        for size in PARTS.get(self.name, (self.shape[0],)):
            y[:, start : start + size] = self.theirs(x, held, slice(start, start + size))
            start += size
        return y

    def product(self, rows: int, peak: float) -> None:
        """One line."""
        x = torch.randn(rows, self.shape[1], device="cuda").to(BFLOAT16)
        self.check(x)
        ours = time_of(lambda held: self.ours(x, held), self.copies)
        others = [
            time_of(lambda held: self.theirs(x, held), self.copies),
            time_of(lambda held: self.in_parts(x, held), self.copies),
            time_of(lambda wide: F.linear(x, wide), self.wide),
            time_of(lambda held: F.linear(x, nf4.dequantize_nf4(*held, self.shape, BFLOAT16)), self.copies),
        ]
        ratios = " | ".join(f"{ours / other:.2f}" for other in others)
        print(f"| {self.name} | {rows} | {ours:.1f} | {self.bytes / ours / peak:.0%} | {ratios} |", flush=True)

    def check(self, x: Tensor, bound: tuple[Tensor, float] | None = None) -> None:
        """At most twice torch's own error; the same bits every time; the locks as they were."""
        exact, allowed = self.bound(x) if bound is None else bound
        first = self.ours(x, self.copies[0])
        wrong = (first.double() - exact).abs().max().item()
        assert wrong <= 2 * allowed, f"wrong by {wrong:.3g}, torch by {allowed:.3g}"
        assert all(torch.equal(self.ours(x, self.copies[0]), first) for _ in range(20)), "not the same every time"
        assert not self.locks.any(), "a lock was left"

    def bound(self, x: Tensor) -> tuple[Tensor, float]:
        """The product in float64, and how far from it torch is."""
        packed, absmax = self.copies[0]
        exact = x.double() @ reference.dequantize_nf4(packed, absmax, self.shape, torch.float64).T
        wide = nf4.dequantize_nf4(packed, absmax, self.shape, BFLOAT16)
        return exact, (F.linear(x, wide).double() - exact).abs().max().item()

    def dequantization(self, peak: float) -> None:
        """One line of the second table."""
        ours, moved = self.time_of_dequantization()
        held = [(*held, torch.empty(self.shape, dtype=BFLOAT16, device="cuda")) for held in self.copies]
        call = torch.ops.bitsandbytes.dequantize_4bit.out
        theirs = time_of(lambda held: call(*held[:2], 64, "nf4", self.shape, BFLOAT16, out=held[2]), held)
        print(f"| {self.name} | {ours:.1f} | {moved / ours / peak:.0%} | {ours / theirs:.2f} |", flush=True)

    def time_of_dequantization(self) -> tuple[float, int]:
        """Microseconds, and the bytes that are read and written."""
        packed, absmax = self.copies[0]
        found = nf4.dequantize_nf4(packed, absmax, self.shape, BFLOAT16)
        assert torch.equal(found, bitsandbytes.functional.dequantize_4bit(packed, self.state)), "other bits"
        held = [(*held, torch.empty(self.shape, dtype=BFLOAT16, device="cuda")) for held in self.copies]
        call = nf4.dequantize_nf4
        return time_of(lambda held: call(*held[:2], self.shape, BFLOAT16, out=held[2]), held), self.bytes + found.nbytes


def sweep_tiles(rows: int, layers: list[Layer]) -> None:
    """The best tiles for that many rows: microseconds of every layer, and of a decoder layer."""
    inputs = [torch.randn(rows, layer.shape[1], device="cuda").to(BFLOAT16) for layer in layers]
    bounds = [layer.bound(x) for layer, x in zip(layers, inputs, strict=True)]
    block_m = max(8, 1 << (rows - 1).bit_length())
    kernels, numbers = CHOICES[block_m]
    found = []
    for kernel, programs in itertools.product(kernels, numbers):
        nf4.TILES = (nf4._Tiles(rows, block_m, *kernel, programs),)
        nf4.KERNEL_ROWS = rows
        times = []
        try:
            for layer, x, bound in zip(layers, inputs, bounds, strict=True):
                layer.check(x, bound)
                times.append(time_of(lambda held, layer=layer, x=x: layer.ours(x, held), layer.copies, 5))
        except (triton.runtime.errors.OutOfResources, AssertionError) as error:
            print(f"{nf4.TILES[0]}: {error}")
            continue
        found.append((sum(times), times, nf4.TILES[0]._replace(rows=block_m)))
    print(f"\n{rows} rows: together µs, " + ", ".join(layer.name for layer in layers))
    for total, times, tiles in sorted(found)[:8]:
        line = f"_Tiles({', '.join(map(str, tiles))}),"
        print(f"    {line:<40}# {total:.1f}: " + ", ".join(f"{time:.1f}" for time in times), flush=True)


def sweep_dequantization() -> None:
    """Weights of a program and its warps, on ``gate_up``."""
    peak, layer = copy_bandwidth(), Layer("gate_up")
    for size, warps in itertools.product((2048, 4096, 8192, 16384), (2, 4, 8)):
        nf4.DEQUANTIZED_AT_ONCE, nf4.DEQUANTIZE_WARPS = size, warps
        microseconds, moved = layer.time_of_dequantization()
        print(f"{size} weights, {warps} warps: {microseconds:.1f} µs, {moved / microseconds / peak:.0%} of a copy")


if __name__ == "__main__":
    main()
