"""The compute-bound kernels: log-probabilities, adapted linear layers, attention.

Shape letters: T packed tokens, V vocabulary, H hidden, N heads, K kv heads, D head dim, R rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels import reference
from posttrain.kernels.benchmark.case import Case, Function, Sizes, drawn, imported


def token_logprobs(sizes: Sizes) -> Iterator[Case]:
    """Of a frozen head: forward and backward are two matrix products at least."""
    for T, V, H, fits in sizes.scored:
        yield _token_logprobs(sizes, T, V, H, fits)


def _token_logprobs(sizes: Sizes, T: int, V: int, H: int, fits: bool) -> Case:

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)

    def two_products(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """What any way to do it contains, as cuBLAS does it, over a part of the vocabulary at a time."""
        with torch.no_grad():
            for tile in weight.split(32768):
                y = (hidden @ tile.T) @ tile
        return y[:, 0]

    def liger() -> Function:
        function = imported("liger_kernel.ops:LigerFusedLinearCrossEntropyFunction")
        return lambda hidden, weight, targets: (
            -function.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "none")[0]
        )

    def unsloth() -> Function:
        score = imported("unsloth_zoo.rl_replacements:grpo_chunked_hidden_states_logprobs")
        return lambda hidden, weight, targets: score(hidden.unsqueeze(0), weight, targets.unsqueeze(0)).squeeze(0)

    def inputs() -> list[Tensor]:
        targets = torch.randint(V, (T,), device=sizes.device)
        return [drawn(sizes, T, H, gradient=True), drawn(sizes, V, H, scale=H**-0.5), targets]

    size = T * H * sizes.dtype.itemsize / 2**20
    return Case(
        "token_logprobs",
        f"T {T} V {V} H {H}",
        inputs,
        lambda: imported("posttrain.kernels.token_logprobs:token_logprobs"),
        plain,
        (2 * 2 * T * V * H, 0),  # the frozen head's gradient comes out of the forward pass
        {"liger": liger, "two products": lambda: two_products},
        unsloth,
        bound="products",
        tail=sizes.tail,
        left_out=() if fits else ("torch", "compile"),
        ungated=("two products",),
        wanted=f"≤ 1.15 × two products, ≤ {size + 300:.0f} MiB" if fits else "≤ 2.5 GB",
    )


def loras(sizes: Sizes) -> Iterator[Case]:
    """A layer, the three before attention, and a whole MLP, each over frozen dense weights."""
    H, inner = sizes.hidden, sizes.inner
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    yield _lora(sizes, "lora_linear", ((inner, H),))
    yield _lora(sizes, "lora_qkv", ((q, H), (kv, H), (kv, H)))
    yield _lora(sizes, "lora_mlp", ((inner, H), (inner, H), (H, inner)))


def _lora(sizes: Sizes, op: str, shapes: tuple[tuple[int, int], ...]) -> Case:
    T, H, rank = sizes.tokens, sizes.hidden, sizes.rank
    scaling = 2.0

    def adapted(outputs: int, inputs: int) -> list[Tensor]:
        weight = drawn(sizes, outputs, inputs, scale=inputs**-0.5)
        a = torch.randn(rank, inputs, device=sizes.device) * inputs**-0.5
        b = torch.randn(outputs, rank, device=sizes.device) * 0.1
        return [weight, a.requires_grad_(), b.requires_grad_()]

    def layers(tensors: tuple[Tensor, ...]) -> list[Any]:
        kinds = imported("posttrain.kernels.reference.lora:Adapted"), imported("posttrain.kernels.reference.lora:Dense")
        triples = zip(tensors[::3], tensors[1::3], tensors[2::3])
        return [kinds[0](kinds[1](weight), a, b, scaling) for weight, a, b in triples]

    def mlp(module: str) -> Callable[[], Function]:
        def make() -> Function:
            function = imported(f"posttrain.kernels.{module}:lora_mlp")

            def call(x: Tensor, *tensors: Tensor) -> Tensor:
                *inside, down = layers(tensors)
                return function(x, inside, down, "silu")

            return call

        return make

    def qkv(module: str) -> Callable[[], Function]:
        def make() -> Function:
            function = imported(f"posttrain.kernels.{module}:lora_qkv")
            return lambda x, *tensors: function(x, layers(tensors))

        return make

    make = mlp if op == "lora_mlp" else qkv
    operations = 2 * T * sum(outputs * inputs for outputs, inputs in shapes)
    return Case(
        op,
        f"{T} rows, {' '.join(f'{outputs}×{inputs}' for outputs, inputs in shapes)}",
        lambda: [
            drawn(sizes, T, H, gradient=True),
            *(tensor for shape in shapes for tensor in adapted(*shape)),
        ],
        make("lora_linear"),
        make("reference.lora")(),
        (operations, operations),
        bound="products",
        outputs=len(shapes) if op == "lora_qkv" else 1,
    )


def attentions(sizes: Sizes) -> Iterator[Case]:
    """The same sequences with a prompt each, and with every prompt stored once for its group."""
    sequences, length, prompt, completion = sizes.lengths
    group = sequences // 2
    yield _attention(sizes, f"{sequences}×{length}", [length] * sequences, None)
    shared = [prompt, *[completion] * group] * 2
    owners = [base for base in (0, group + 1) for _ in range(group + 1)]
    yield _attention(sizes, f"2×({prompt}+{group}×{completion}) shared", shared, owners)


def _attention(sizes: Sizes, name: str, lengths: list[int], prompts: list[int] | None) -> Case:
    N, K, D = sizes.heads, sizes.kv_heads, sizes.head_dim
    segments = reference.Segments.of(lengths, prompts, sizes.device)
    tokens = sum(lengths)

    def inputs() -> list[Tensor]:
        return [drawn(sizes, tokens, heads, D, gradient=True) for heads in (N, K, K)]

    def ours() -> Function:
        attention = imported("posttrain.kernels.attention:attention")
        return lambda q, k, v: attention(q, k, v, segments, scale=D**-0.5)

    pairs = sum(
        each * each / 2 + (0 if owner == index else each * lengths[owner])
        for index, (each, owner) in enumerate(zip(lengths, segments.prompts))
    )
    others = {"varlen_attn": lambda: _varlen(segments, D)} if prompts is None else {}
    return Case(
        "attention",
        f"{name}, heads {N}/{K}×{D}",
        inputs,
        ours,
        lambda q, k, v: reference.attention(q, k, v, segments, scale=D**-0.5),
        (4 * pairs * N * D, 10 * pairs * N * D),
        others,
        bound="products",
        left_out=("compile",),
    )


def _varlen(segments: Any, width: int) -> Function:
    varlen_attn = imported("torch.nn.attention.varlen:varlen_attn")
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"scale": width**-0.5, "window_size": (-1, 0)}
        if grouped:
            options["enable_gqa"] = True
        else:  # torch 2.11 wants as many key heads as query heads
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        longest = segments.max_length
        return varlen_attn(q, k, v, segments.cu_seqlens, segments.cu_seqlens, longest, longest, **options)

    return call
