"""The compute-bound kernels: log-probabilities, adapted and quantized linear layers, attention.

Shape letters: T packed tokens, V vocabulary, H hidden, N heads, K kv heads, D head dim, R rank, M rows, O outputs,
I inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels import reference
from posttrain.kernels.benchmark.case import Case, Function, Sizes, drawn, imported

NF4_BLOCK = 64


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


def nf4s(sizes: Sizes) -> Iterator[Case]:
    """Dequantizing, and the product with few rows, in bitsandbytes' layout."""
    for layer in sizes.layers:
        yield from _nf4(sizes, *layer)


def _nf4(sizes: Sizes, name: str, outputs: int, inputs: int) -> Iterator[Case]:
    code = nf4_code(sizes.device)
    shape = (outputs, inputs)

    def weights() -> list[Tensor]:
        packed = torch.randint(256, (outputs * inputs // 2, 1), dtype=torch.uint8, device=sizes.device)
        absmax = (torch.rand(outputs * inputs // NF4_BLOCK, device=sizes.device) + 0.5) * inputs**-0.5
        return [packed, absmax]

    def wide(packed: Tensor, absmax: Tensor, like: Tensor) -> Tensor:
        codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=1).view(-1)
        blocks = code[codes.long()].view(-1, NF4_BLOCK) * absmax.unsqueeze(1)
        return blocks.view(shape).to(like.dtype)

    def state(absmax: Tensor) -> Any:
        kind = imported("bitsandbytes.functional:QuantState")
        return kind(absmax, torch.Size(shape), code, NF4_BLOCK, "nf4", sizes.dtype)

    def ours() -> Function:
        function = imported("posttrain.kernels.nf4:dequantize_nf4")
        return lambda packed, absmax, like: function(packed, absmax, shape, like.dtype, block_size=NF4_BLOCK, code=code)

    def theirs(path: str) -> Callable[[], Function]:
        def make() -> Function:
            function = imported(path)
            return lambda packed, absmax, like: function(packed, state(absmax))

        return make

    yield Case(
        "nf4 dequantize",
        f"{name} {outputs}×{inputs}",
        lambda: [*weights(), drawn(sizes, 0)],
        ours,
        wide,
        (outputs * inputs * (0.5 + 4 / NF4_BLOCK + sizes.dtype.itemsize), 0),
        {"bitsandbytes": theirs("bitsandbytes.functional:dequantize_4bit")},
        theirs("unsloth.kernels:fast_dequantize"),
        rotated=(0,),
    )
    for rows in sizes.rows:
        yield _nf4_product(sizes, name, shape, rows, weights, wide, state, code)


def _nf4_product(
    sizes: Sizes,
    name: str,
    shape: tuple[int, int],
    rows: int,
    weights: Callable[[], list[Tensor]],
    wide: Callable[..., Tensor],
    state: Callable[[Tensor], Any],
    code: Tensor,
) -> Case:
    outputs, inputs = shape

    def made() -> list[Tensor]:
        x, (packed, absmax) = drawn(sizes, rows, inputs), weights()
        return [x, packed, absmax, wide(packed, absmax, x)]

    def ours() -> Function:
        function = imported("posttrain.kernels.nf4:nf4_linear")
        return lambda x, packed, absmax, dense: function(x, packed, absmax, shape, block_size=NF4_BLOCK, code=code)

    def bitsandbytes() -> Function:
        function = imported("bitsandbytes:matmul_4bit")
        return lambda x, packed, absmax, dense: function(x, packed.t(), state(absmax))

    def unsloth() -> Function:
        gemv, product = imported("unsloth.kernels:fast_gemv"), imported("unsloth.kernels:matmul_lora")

        def call(x: Tensor, packed: Tensor, absmax: Tensor, dense: Tensor) -> Tensor:
            if rows == 1:
                return gemv(x.unsqueeze(0), packed, state(absmax)).view(1, -1)
            return product(x, packed, state(absmax), None, None, None)

        return call

    def plain(x: Tensor, packed: Tensor, absmax: Tensor, dense: Tensor) -> Tensor:
        return F.linear(x, wide(packed, absmax, x))

    return Case(
        "nf4 product",
        f"{rows} rows, {name} {outputs}×{inputs}",
        made,
        ours,
        plain,
        (outputs * inputs * (0.5 + 4 / NF4_BLOCK) + rows * (inputs + outputs) * sizes.dtype.itemsize, 0),
        {"cublas": lambda: lambda x, packed, absmax, dense: F.linear(x, dense), "bitsandbytes": bitsandbytes},
        unsloth,
        rotated=(1, 3),
        left_out=("torch", "compile"),
        wanted="≥ 2 × bitsandbytes, ≥ 1 × cublas",
    )


def fp8s(sizes: Sizes) -> Iterator[Case]:
    """The product with few rows over a float8 weight under one scale."""
    for layer in sizes.layers:
        for rows in sizes.rows:
            yield _fp8_product(sizes, *layer, rows)


def _fp8_product(sizes: Sizes, name: str, outputs: int, inputs: int, rows: int) -> Case:
    def made() -> list[Tensor]:
        weight = torch.randn(outputs, inputs, device=sizes.device).to(torch.float8_e4m3fn)
        scale = torch.full((1,), inputs**-0.5, device=sizes.device)
        x = drawn(sizes, rows, inputs)
        return [x, weight, scale, reference.fp8_weight(weight, scale, x.dtype)]

    def ours() -> Function:
        function = imported("posttrain.kernels.fp8_linear:fp8_linear")
        return lambda x, weight, scale, dense: function(x, weight, scale)

    return Case(
        "fp8 product",
        f"{rows} rows, {name} {outputs}×{inputs}",
        made,
        ours,
        lambda x, weight, scale, dense: F.linear(x, reference.fp8_weight(weight, scale, x.dtype)),
        (outputs * inputs + rows * (inputs + outputs) * sizes.dtype.itemsize, 0),
        {"cublas": lambda: lambda x, weight, scale, dense: F.linear(x, dense)},
        rotated=(1, 3),
        left_out=("torch", "compile"),
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


def nf4_code(device: str) -> Tensor:
    """The 16 values of NF4 (2305.14314, appendix E), float32 [16]."""
    below = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
    below += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
    above = [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    above += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    return torch.tensor(below + above, device=device)
