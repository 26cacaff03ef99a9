"""What LoRA adds to a frozen layer of Qwen3-4B at 16,384 tokens: microseconds of each product, and of the orders to add
them up in. Half a minute on a GPU.

The narrow products are bound by the bytes of x or of the gradient, so they are shown as a share of the bandwidth of a
copy. Each variant is compared with float64 before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from posttrain.kernels.lora_linear import lora_linear
from posttrain.kernels.reference import Dense

TOKENS, RANK = 16_384, 16
SHAPES = {"q": (4096, 2560), "k": (1024, 2560), "o": (2560, 4096), "gate": (9728, 2560), "down": (2560, 9728)}
Variant = Callable[[], Tensor]


def main() -> None:
    """Three tables: narrow products, the two orders, the whole layer."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    peak = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    print(f"copy: {peak / 1e9:.0f} GB/s\n\n| narrow product | µs | of copy bandwidth |\n|---|---|---|")
    with torch.no_grad():
        narrow_products(peak)
        print("\n| layer | order | µs | × one product |\n|---|---|---|---|")
        for name in SHAPES:
            orders(name)
    print("\n| layer | direction | µs | × one product |\n|---|---|---|---|")
    for name in SHAPES:
        whole(name)


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers of size 1/√(last dim)."""
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device="cuda") * shape[-1] ** -0.5).to(dtype)


def seconds(work: Callable[[], object]) -> float:
    """Median; L2 is emptied in between."""
    return do_bench(work, warmup=20, rep=100, return_mode="median") / 1e3


def narrow_products(peak: float) -> None:
    """``x Aᵀ`` and ``g B`` per stacked rank, and the sums over all tokens with float32 results."""
    for wide in (1024, 2560, 4096, 9728):
        x = drawn(TOKENS, wide)
        for rank in (RANK, 2 * RANK, 3 * RANK):
            a, low = drawn(rank, wide), drawn(TOKENS, rank)
            variants: dict[str, Variant] = {
                "x Aᵀ": lambda x=x, a=a: x @ a.T,
                "(x Aᵀ) Bᵀ": lambda low=low, a=a: low @ a,
                "gᵀ (x Aᵀ), float32": lambda x=x, low=low: torch.mm(x.T, low, out_dtype=torch.float32),
                "(g B)ᵀ x, float32": lambda x=x, low=low: torch.mm(low.T, x, out_dtype=torch.float32),
            }
            for name, work in variants.items():
                taken = seconds(work)
                print(f"| {name}, {wide} wide, rank {rank} | {taken * 1e6:.0f} | {x.nbytes / taken / peak:.0%} |")


def orders(name: str) -> None:
    """The low-rank term first or last, forward and for the gradient of x; one product alone is 1."""
    outputs, inputs = SHAPES[name]
    x, g, weight = drawn(TOKENS, inputs), drawn(TOKENS, outputs), drawn(outputs, inputs)
    xa, b, gb, a = drawn(TOKENS, RANK), drawn(outputs, RANK), drawn(TOKENS, RANK), drawn(RANK, inputs)

    def first(low: Tensor, narrow: Tensor, wide: Tensor, matrix: Tensor) -> Tensor:
        y = low @ narrow
        return torch.addmm(y, wide, matrix, out=y)

    table: dict[str, tuple[Variant, Variant]] = {
        "forward, low rank first": (lambda: first(xa, b.T, x, weight.T), lambda: F.linear(x, weight)),
        "forward, low rank last": (lambda: F.linear(x, weight).addmm_(xa, b.T), lambda: F.linear(x, weight)),
        "gradient, low rank first": (lambda: first(gb, a, g, weight), lambda: g @ weight),
        "gradient, low rank last": (lambda: (g @ weight).addmm_(gb, a), lambda: g @ weight),
    }
    for order, (work, alone) in table.items():
        low, narrow, wide, matrix = (xa, b.T, x, weight.T) if order.startswith("forward") else (gb, a, g, weight)
        exact = wide[:64].double() @ matrix.double() + low[:64].double() @ narrow.double()
        assert (work()[:64] - exact).abs().max() <= 0.02 * exact.abs().max(), order
        taken = seconds(work)
        print(f"| {name} | {order} | {taken * 1e6:.0f} | {taken / seconds(alone):.2f} |")


def whole(name: str) -> None:
    """``lora_linear`` beside the frozen layer alone."""
    outputs, inputs = SHAPES[name]
    x, weight, g = drawn(TOKENS, inputs).requires_grad_(), drawn(outputs, inputs), drawn(TOKENS, outputs)
    a, b = drawn(RANK, inputs, dtype=torch.float32), drawn(outputs, RANK, dtype=torch.float32)
    wanted = [x, a.requires_grad_(), b.requires_grad_()]
    forward = seconds(lambda: lora_linear(x, Dense(weight), a, b, 2.0))
    y = lora_linear(x, Dense(weight), a, b, 2.0)
    backward = seconds(lambda: torch.autograd.grad(y, wanted, g, retain_graph=True))
    with torch.no_grad():
        alone = seconds(lambda: F.linear(x, weight)), seconds(lambda: g @ weight)
    print(f"| {name} | forward | {forward * 1e6:.0f} | {forward / alone[0]:.2f} |")
    print(f"| {name} | backward | {backward * 1e6:.0f} | {backward / alone[1]:.2f} |")


if __name__ == "__main__":
    main()
