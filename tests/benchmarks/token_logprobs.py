"""Log-probabilities and their gradient at 8,192 × 151,936 × 4,096 in bfloat16, by the sizes of their tiles.

Times are of forward and backward, relative to the two products of cuBLAS in bfloat16 that they must contain (logits,
and probabilities by the weight). "extra" is the peak beyond what lay there, the gradient of the hidden states included.
The first lines compare with float64; the last is the longest batch, 8 × 20,480 tokens over 128,256 symbols.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, VOCABULARY, WIDTH = 8192, 151_936, 4096
LONG_TOKENS, LONG_VOCABULARY = 163_840, 128_256
REPEATS = 7


def main() -> None:
    """Check, then one table line for each choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--chunks", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--numbers", type=int, nargs="+", default=[8, 32], help="numbers a thread, at the default tile")
    parser.add_argument("--without-long", action="store_true", help="leave out the longest batch")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    from posttrain.kernels import token_logprobs, vocabulary_tiles

    hidden, weight, targets = problem(TOKENS, VOCABULARY)
    check(hidden[:256], weight, targets[:256])
    products = time_of(lambda: two_products(hidden, weight))
    print(f"two products {products:.2f} ms, {4 * TOKENS * VOCABULARY * WIDTH / products / 1e9:.0f} TFLOP/s\n")
    print(
        "| rows | columns | numbers a thread | forward ms | both ms | ÷ two products | without gradient ms | extra MB |"
    )
    print("|" + "---|" * 8)
    rows, columns, numbers = token_logprobs.ROWS, token_logprobs.CHUNK, vocabulary_tiles.NUMBERS_A_THREAD
    choices = [(height, width, numbers) for height in chosen.rows for width in chosen.chunks]
    for height, width, each in choices + [(rows, columns, each) for each in chosen.numbers]:
        token_logprobs.ROWS, vocabulary_tiles.NUMBERS_A_THREAD = height, each
        line(hidden, weight, targets, width, products)
    token_logprobs.ROWS, vocabulary_tiles.NUMBERS_A_THREAD = rows, numbers
    del hidden, weight, targets
    if not chosen.without_long:
        hidden, weight, targets = problem(LONG_TOKENS, LONG_VOCABULARY)
        extra = extra_of(lambda: both(hidden, weight, targets, columns))
        print(f"\n{LONG_TOKENS} tokens, {LONG_VOCABULARY} symbols: {extra / 1e6:.0f} MB extra")


def problem(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of standard deviation 3, about as far apart as a language model's; a target drawn at random."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, WIDTH, **draw)
    weight = torch.randn(vocabulary, WIDTH, **draw).mul_(3 / WIDTH**0.5)
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    return hidden.requires_grad_(), weight, targets


def line(hidden: Tensor, weight: Tensor, targets: Tensor, columns: int, products: float) -> None:
    """One line of the table, at the module's present settings."""
    from posttrain.kernels import token_logprobs, vocabulary_tiles

    forward = time_of(lambda: token_logprobs.token_logprobs(hidden, weight, targets, chunk=columns))
    with torch.no_grad():
        alone = time_of(lambda: token_logprobs.token_logprobs(hidden, weight, targets, chunk=columns))
    together = time_of(lambda: both(hidden, weight, targets, columns))
    extra = extra_of(lambda: both(hidden, weight, targets, columns))
    settings = f"{token_logprobs.ROWS} | {columns} | {vocabulary_tiles.NUMBERS_A_THREAD}"
    times = f"{forward:.2f} | {together:.2f} | {together / products:.3f} | {alone:.2f}"
    print(f"| {settings} | {times} | {extra / 1e6:.0f} |", flush=True)


def both(hidden: Tensor, weight: Tensor, targets: Tensor, columns: int) -> Tensor:
    """The gradient of the hidden states, with a gradient of the loss that differs from row to row."""
    from posttrain.kernels.token_logprobs import token_logprobs

    logprobs, _ = token_logprobs(hidden, weight, targets, chunk=columns)
    return torch.autograd.grad(logprobs, hidden, logprobs.detach())[0]


@torch.no_grad()
def two_products(hidden: Tensor, weight: Tensor) -> None:
    """What no method can leave out, at its best: whole, in bfloat16."""
    torch.mm(torch.mm(hidden, weight.T), weight)


def check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Errors of values and gradient against float64, beside torch's with float32 logits, and with its own bfloat16."""
    from posttrain.kernels.token_logprobs import token_logprobs

    def dense(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(h, w)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        values = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        return values.detach(), torch.autograd.grad(values.sum(), h)[0]

    leaf = hidden.detach().requires_grad_()
    exact, exact_grad = dense(hidden.detach().double().requires_grad_(), weight.double())
    theirs, their_grad = dense(leaf, weight)
    ours = token_logprobs(leaf, weight, targets)[0]
    our_grad = torch.autograd.grad(ours.sum(), leaf)[0]

    def wrong(found: Tensor, expected: Tensor) -> float:
        return (found.double() - expected).abs().max().item()

    values = wrong(ours.detach(), exact), wrong(theirs, exact)
    gradients = wrong(our_grad, exact_grad), wrong(their_grad, exact_grad)
    print(f"errors, ours and torch's: logprobs {values[0]:.1e} {values[1]:.1e} nats, ", end="")
    print(f"gradient {gradients[0]:.1e} {gradients[1]:.1e} of {exact_grad.abs().max().item():.2f}")
    assert values[0] <= 2 * values[1] and gradients[0] <= 2 * gradients[1]


def time_of(call: Callable[[], object]) -> float:
    """Median milliseconds on the GPU, after a call that compiles."""
    call()
    torch.cuda.synchronize()
    found = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return median(found)


def extra_of(call: Callable[[], object]) -> int:
    """Bytes at the peak beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
