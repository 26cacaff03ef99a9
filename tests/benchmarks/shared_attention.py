"""Milliseconds of one attention layer, forward and backward, by the ways ``trainer.attention`` has, in bfloat16.

Decides its three switches: ``TRITON_FOR_SHARED_PROMPTS`` (our kernel or flash attention with copied keys),
``TRITON_FOR_REPEATED_HEADS`` (our kernel or repeated keys on an ordinary pack), and, with the time of the rest of a
layer, ``trainer.shared_prompts.LEAST_SAVING``. Nothing is timed before it has been compared with the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from posttrain.kernels.reference.attention import Segments
from posttrain.trainer import attention

SHAPES = {
    "qwen3-4b": (32, 8, 128),
    "llama-3.1-8b": (32, 8, 128),
    "smollm2-1.7b": (32, 32, 64),
    "gemma3-4b": (8, 4, 256),
}
"""Query heads, key heads, head dim."""
TASKS = ((1024, 8, 256), (512, 8, 512), (256, 8, 2048), (64, 8, 1024), (4096, 16, 256))
"""Tokens of a prompt, its completions, tokens of each."""
TOKENS = 16384
"""Unshared; as many groups as fit."""
REPEATS = 5


def main() -> None:
    """One line a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b")
    shape = SHAPES[parser.parse_args().shape]
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    print(f"torch {torch.__version__}, key heads repeated: {not attention._varlen_groups_heads()}")
    print("| prompt, group, completion | tokens | shared | shared: ours | flash | unshared: ours | flash |")
    print("|---|---|---|---|---|---|---|")
    for prompt, group, completion in TASKS:
        count = max(1, TOKENS // (group * (prompt + completion)))
        first = torch.arange(count).repeat_interleave(group + 1) * (group + 1)
        shared = Segments.of([prompt, *[completion] * group] * count, first.tolist(), "cuda")
        plain = Segments.of([prompt + completion] * group * count, device="cuda")
        times = [
            measure(way, shape, segments)
            for segments in (shared, plain)
            for way in (attention._triton, attention._varlen)
        ]
        cells = " | ".join(f"{time:.2f}" for time in times)
        print(f"| {prompt}, {group}, {completion} | {plain.bounds[-1]} | {shared.bounds[-1]} | {cells} |", flush=True)


def measure(way: Callable[..., Tensor], shape: tuple[int, int, int], segments: Segments) -> float:
    """Median milliseconds of a forward and backward pass."""
    heads, key_heads, width = shape
    tokens = segments.bounds[-1]
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(tokens, n, width, device="cuda", generator=generator).bfloat16().requires_grad_()
        for n in (heads, key_heads, key_heads)
    )
    rule = attention._Rule(width**-0.5, None, None, None)
    grad = torch.randn_like(q)

    def step() -> tuple[Tensor, ...]:
        out = way(q, k, v, segments, rule)
        return out, *torch.autograd.grad(out, (q, k, v), grad)

    found = step()
    expected = attention._reference(q, k, v, segments, rule)
    for ours, theirs in zip(found, (expected, *torch.autograd.grad(expected, (q, k, v), grad)), strict=True):
        distance = ((ours - theirs).float().norm() / theirs.float().norm()).item()
        assert distance < 2e-2, f"{way.__name__}: off by {distance:.1%}"
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times)


if __name__ == "__main__":
    main()
