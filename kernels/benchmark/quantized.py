"""Weights in 4 and 8 bits: dequantized, and multiplied by few rows as they are.

Shape letters: M rows, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.kernels import reference
from posttrain.kernels.benchmark.case import Case, Function, Sizes, drawn, imported

NF4_BLOCK = 64


def nf4s(sizes: Sizes) -> Iterator[Case]:
    """Dequantizing, and the product with few rows, in bitsandbytes' layout."""
    for name, outputs, inputs in sizes.layers:
        yield _nf4_dequantize(sizes, name, (outputs, inputs))
        for rows in sizes.rows:
            yield _nf4_product(sizes, name, (outputs, inputs), rows)


def _nf4_weight(sizes: Sizes, shape: tuple[int, int]) -> list[Tensor]:
    """Random bits, and an absmax for each block."""
    outputs, inputs = shape
    packed = torch.randint(256, (outputs * inputs // 2, 1), dtype=torch.uint8, device=sizes.device)
    return [packed, (torch.rand(outputs * inputs // NF4_BLOCK, device=sizes.device) + 0.5) * inputs**-0.5]


def _nf4_state(sizes: Sizes, shape: tuple[int, int], absmax: Tensor) -> Any:
    """As bitsandbytes and Unsloth want it."""
    state = imported("bitsandbytes.functional:QuantState")
    code = torch.tensor(reference.NF4_CODE, device=sizes.device)
    return state(absmax, torch.Size(shape), code, NF4_BLOCK, "nf4", sizes.dtype)


def _nf4_dequantize(sizes: Sizes, name: str, shape: tuple[int, int]) -> Case:
    outputs, inputs = shape

    def ours() -> Function:
        function = imported("posttrain.kernels.nf4:dequantize_nf4")
        return lambda packed, absmax, like: function(packed, absmax, shape, like.dtype, block_size=NF4_BLOCK)

    def theirs(path: str) -> Callable[[], Function]:
        def make() -> Function:
            function, state = imported(path), _nf4_state(sizes, shape, _nf4_weight(sizes, shape)[1])

            def call(packed: Tensor, absmax: Tensor, like: Tensor) -> Tensor:
                state.absmax = absmax
                return function(packed, state)

            return call

        return make

    return Case(
        "nf4 dequantize",
        f"{name} {outputs}×{inputs}",
        lambda: [*_nf4_weight(sizes, shape), drawn(sizes, 0)],
        ours,
        lambda packed, absmax, like: reference.dequantize_nf4(packed, absmax, shape, like.dtype, block_size=NF4_BLOCK),
        (outputs * inputs * (0.5 + 4 / NF4_BLOCK + sizes.dtype.itemsize), 0),
        {"bitsandbytes": theirs("bitsandbytes.functional:dequantize_4bit")},
        theirs("unsloth.kernels:fast_dequantize"),
        rotated=(0,),
    )


def _nf4_product(sizes: Sizes, name: str, shape: tuple[int, int], rows: int) -> Case:
    outputs, inputs = shape

    def made() -> list[Tensor]:
        x, (packed, absmax) = drawn(sizes, rows, inputs), _nf4_weight(sizes, shape)
        dense = reference.dequantize_nf4(packed, absmax, shape, sizes.dtype, block_size=NF4_BLOCK)
        return [x, packed, absmax, dense]

    def ours() -> Function:
        function = imported("posttrain.kernels.nf4:nf4_linear")
        locks = torch.zeros(imported("posttrain.kernels.split_k:LOCKS"), dtype=torch.int32, device=sizes.device)
        return lambda x, packed, absmax, dense: function(x, packed, absmax, shape, block_size=NF4_BLOCK, locks=locks)

    def bitsandbytes() -> Function:
        function, state = imported("bitsandbytes:matmul_4bit"), _nf4_state(sizes, shape, torch.empty(0))

        def call(x: Tensor, packed: Tensor, absmax: Tensor, dense: Tensor) -> Tensor:
            state.absmax = absmax
            return function(x, packed.t(), state)

        return call

    def unsloth() -> Function:
        gemv, product = imported("unsloth.kernels:fast_gemv"), imported("unsloth.kernels:matmul_lora")
        state = _nf4_state(sizes, shape, torch.empty(0))

        def call(x: Tensor, packed: Tensor, absmax: Tensor, dense: Tensor) -> Tensor:
            state.absmax = absmax
            if rows == 1:
                return gemv(x.unsqueeze(0), packed, state).view(1, -1)
            return product(x, packed, state, None, None, None)

        return call

    def plain(x: Tensor, packed: Tensor, absmax: Tensor, dense: Tensor) -> Tensor:
        return F.linear(x, reference.dequantize_nf4(packed, absmax, shape, x.dtype, block_size=NF4_BLOCK))

    return Case(
        "nf4 product",
        f"{rows} rows, {name} {outputs}×{inputs}",
        made,
        ours,
        plain,
        (outputs * inputs * (0.5 + 4 / NF4_BLOCK) + rows * (inputs + outputs) * sizes.dtype.itemsize, 0),
        {"cublas": lambda: _dense_product, "bitsandbytes": bitsandbytes},
        unsloth,
        rotated=(1, 3),
        left_out=("torch", "compile"),
        wanted="≥ 2 × bitsandbytes, ≥ 1 × cublas",
    )


def fp8s(sizes: Sizes) -> Iterator[Case]:
    """Dequantizing, and the product with few rows, over a float8 weight under one scale."""
    for name, outputs, inputs in sizes.layers:
        yield _fp8_dequantize(sizes, name, (outputs, inputs))
        for rows in sizes.rows:
            yield _fp8_product(sizes, name, (outputs, inputs), rows)


def _fp8_weight(sizes: Sizes, shape: tuple[int, int]) -> list[Tensor]:
    weight = torch.randn(*shape, device=sizes.device).to(torch.float8_e4m3fn)
    return [weight, torch.full((1,), shape[1] ** -0.5, device=sizes.device)]


def _fp8_dequantize(sizes: Sizes, name: str, shape: tuple[int, int]) -> Case:
    def ours() -> Function:
        function = imported("posttrain.kernels.fp8:dequantize_fp8")
        return lambda weight, scale, like: function(weight, scale, like.dtype)

    return Case(
        "fp8 dequantize",
        f"{name} {shape[0]}×{shape[1]}",
        lambda: [*_fp8_weight(sizes, shape), drawn(sizes, 0)],
        ours,
        lambda weight, scale, like: reference.dequantize_fp8(weight, scale, like.dtype),
        (shape[0] * shape[1] * (1 + sizes.dtype.itemsize), 0),
        rotated=(0,),
    )


def _fp8_product(sizes: Sizes, name: str, shape: tuple[int, int], rows: int) -> Case:
    outputs, inputs = shape

    def made() -> list[Tensor]:
        x, (weight, scale) = drawn(sizes, rows, inputs), _fp8_weight(sizes, shape)
        return [x, weight, scale, reference.dequantize_fp8(weight, scale, x.dtype)]

    def ours() -> Function:
        function = imported("posttrain.kernels.fp8_linear:fp8_linear")
        locks = torch.zeros(imported("posttrain.kernels.split_k:LOCKS"), dtype=torch.int32, device=sizes.device)
        return lambda x, weight, scale, dense: function(x, weight, scale, None, locks)

    return Case(
        "fp8 product",
        f"{rows} rows, {name} {outputs}×{inputs}",
        made,
        ours,
        lambda x, weight, scale, dense: F.linear(x, reference.dequantize_fp8(weight, scale, x.dtype)),
        (outputs * inputs + rows * (inputs + outputs) * sizes.dtype.itemsize, 0),
        {"cublas": lambda: _dense_product},
        rotated=(1, 3),
        left_out=("torch", "compile"),
    )


def _dense_product(x: Tensor, weight: Tensor, scale: Tensor, dense: Tensor) -> Tensor:
    """Over the dequantized weight: what a layer in bfloat16 takes."""
    return F.linear(x, dense)
