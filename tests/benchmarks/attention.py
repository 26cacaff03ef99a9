"""Our attention beside torch's flash attention, in bfloat16: TFLOP/s of one layer, forward and with its backward pass.

Packs of sequences that share nothing run both; groups that share a prompt run ours, beside flash attention over the
same group with the prompt once for each completion. Products that a mask hides are not counted. ``--sweep`` times the
tiles of one kernel, best first. Nothing is timed before it has been compared with the reference.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from posttrain.kernels import attention as ours
from posttrain.kernels import reference
from posttrain.kernels.reference.attention import Segments

SHAPES = {"64": (32, 8, 64), "128": (32, 8, 128), "256": (8, 4, 256)}
"""Query heads, key heads, head dim."""
PACKS = {
    "16 x 1k": ([1024] * 16, None),
    "1 x 16k": ([16384], None),
    "1 group of 1024 + 8 x 256": ([1024, *[256] * 8], [0] * 9),
    "5 groups of 1024 + 8 x 256": ([1024, *[256] * 8] * 5, [first for first in range(0, 45, 9) for _ in range(9)]),
}
SWEPT = {
    "forward": ((64, 128), (64, 128), (4, 8), (2, 3)),
    "query_gradient": ((64, 128), (32, 64), (4, 8), (2, 3)),
    "key_gradient": ((64, 128), (32, 64), (4, 8), (2, 3)),
}
"""Rows kept, rows of a step, warps, stages."""
REPEATS = 7


def main() -> None:
    """One line a pack, or one for each choice of tiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["128"], help="by head dim")
    parser.add_argument("--sweep", choices=SWEPT, help="tiles of this kernel instead, on the pack of --pack")
    parser.add_argument("--pack", choices=PACKS, default="16 x 1k")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    for shape in chosen.shapes:
        if chosen.sweep:
            sweep(shape, chosen.pack, chosen.sweep)
        else:
            compare(shape)


def compare(shape: str) -> None:
    """A table over all packs."""
    print(f"heads {SHAPES[shape]}: TFLOP/s (ms); the last column is flash attention's time by ours")
    print("| pack | ours, forward | backward | flash, forward | backward | ratio |\n|---|---|---|---|---|---|")
    for name, (lengths, prompts) in PACKS.items():
        own, apart = Segments.of(lengths, prompts, "cuda"), unshared(lengths, prompts)
        tensors = problem(SHAPES[shape], own.bounds[-1])
        check(tensors, own)
        mine = times(own_attention, tensors, own)
        heads, _, width = SHAPES[shape]
        theirs = times(flash, problem((heads, heads, width), apart.bounds[-1]), apart)
        cells = [
            " | ".join(
                f"{flops(SHAPES[shape], segments) * products / time / 1e9:.0f} ({time:.2f})"
                for time, products in zip(found, (2, 5))
            )
            for segments, found in ((own, mine), (apart, theirs))
        ]
        print(f"| {name} | {cells[0]} | {cells[1]} | {sum(theirs) / sum(mine):.2f} |", flush=True)


def sweep(shape: str, pack: str, kernel: str) -> None:
    """Milliseconds of one kernel by its tiles; those that do not fit or spill much are slow or left out."""
    segments = Segments.of(*PACKS[pack], "cuda")
    tensors = problem(SHAPES[shape], segments.bounds[-1])
    q, k, v, grad = (tensor.detach() for tensor in tensors)
    rule = ours._Rule(q.shape[2] ** -0.5, None, None)
    out, lse = ours._forward(q, k, v, segments, rule)
    found = []
    for tiles in itertools.starmap(ours.Tiles, itertools.product(*SWEPT[kernel])):
        with replaced(q, **{kernel: tiles}):
            try:
                if kernel == "forward":
                    time = time_of(lambda: ours._forward(q, k, v, segments, rule))
                else:
                    time = time_of(lambda: ours._backward(q, k, v, out, lse, grad, segments, rule))
            except OutOfResources:
                continue
        found.append((time, tiles))
    known = getattr(ours.tiles_of(q), kernel)
    print(f"heads {SHAPES[shape]}, {pack}: ms of {'the forward' if kernel == 'forward' else 'the whole backward'} pass")
    for time, tiles in sorted(found)[:8]:
        print(f"{time:.3f} {tuple(tiles)}{' as in the table' if tiles == known else ''}", flush=True)


@contextmanager
def replaced(q: Tensor, **tiles: ours.Tiles) -> Iterator[None]:
    """Other tiles for the while."""
    table = dict(ours.TILES)
    used = ours.tiles_of(q)
    ours.TILES.update({key: kernels._replace(**tiles) for key, kernels in table.items() if kernels is used})
    try:
        yield
    finally:
        ours.TILES.update(table)


def unshared(lengths: list[int], prompts: list[int] | None) -> Segments:
    """The same sequences, each with its own copy of its prompt."""
    if prompts is None:
        return Segments.of(lengths, device="cuda")
    whole = [
        lengths[prompt] + length for index, (length, prompt) in enumerate(zip(lengths, prompts)) if prompt != index
    ]
    return Segments.of(whole, device="cuda")


def problem(shape: tuple[int, int, int], tokens: int) -> tuple[Tensor, ...]:
    """q, k, v and the output's gradient."""
    heads, key_heads, width = shape
    generator = torch.Generator("cuda").manual_seed(0)
    draw = [
        torch.randn(tokens, n, width, device="cuda", generator=generator) for n in (heads, key_heads, key_heads, heads)
    ]
    return tuple(tensor.bfloat16().requires_grad_() for tensor in draw)


def own_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Ours, with the usual scale."""
    return ours.attention(q, k, v, segments, scale=q.shape[2] ** -0.5)


def flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """torch's varlen_attn, with as many key heads as query heads: torch 2.11 takes no fewer."""
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = segments.cu_seqlens, segments.max_length
    return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))


def check(tensors: tuple[Tensor, ...], segments: Segments) -> None:
    """Output and gradients lie within two percent of the reference."""
    *leaves, grad = tensors
    scale = leaves[0].shape[2] ** -0.5
    found, expected = (attend(*leaves, segments, scale=scale) for attend in (ours.attention, reference.attention))
    pairs = [(found, expected)]
    pairs += zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad))
    for mine, theirs in pairs:
        distance = ((mine - theirs).float().norm() / theirs.float().norm()).item()
        assert distance < 2e-2, f"off by {distance:.2%}"


def flops(shape: tuple[int, int, int], segments: Segments) -> float:
    """Of one product of all queries with the keys they see."""
    pairs = 0
    for index, (start, stop) in enumerate(itertools.pairwise(segments.bounds)):
        prompt = segments.prompts[index]
        before = 0 if prompt == index else segments.bounds[prompt + 1] - segments.bounds[prompt]
        pairs += (stop - start) * before + (stop - start) * (stop - start + 1) // 2
    return 2.0 * pairs * shape[0] * shape[2]


def times(attend: Callable[..., Tensor], tensors: tuple[Tensor, ...], segments: Segments) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass."""
    *leaves, grad = tensors
    out = attend(*leaves, segments)
    with torch.no_grad():
        forward = time_of(lambda: attend(*leaves, segments))
    return forward, time_of(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))


def time_of(call: Callable[[], object]) -> float:
    """Median milliseconds, the launches of a call queued behind one another."""
    call()
    found = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # half a millisecond in which the host gets ahead
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return median(found)


if __name__ == "__main__":
    main()
