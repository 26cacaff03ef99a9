"""How the tiles of the norms, the rotary embedding and the gated units are chosen: each table's candidates, measured.

    python tests/benchmarks/elementwise_tiles.py [--only rms_norm rope glu] [--hidden 2560] [--inner 9728]

At 16,384 tokens in bfloat16, 32 + 8 heads of 128; bandwidth as a share of a large copy's; under a minute on an H200.
``>`` marks what the kernel file has now.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from posttrain.kernels import glu, rms_norm, rope
from posttrain.kernels.benchmark.measure import Bench, measure_ceiling, short

TOKENS = 16384
EPS = 1e-6


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def sweep(
    bench: Bench, name: str, module: ModuleType, table: str, values: Iterable[tuple[Any, ...]], call: Callable[[], Any]
) -> None:
    """One line for each candidate. The bytes are those of the tensors that ``call`` returns."""
    now = getattr(module, table)
    for options in values:
        tiles = now._replace(**dict(zip(now._fields, options)))
        setattr(module, table, tiles)
        try:
            moved = sum(tensor.nbytes for tensor in call())
            share = moved / bench.seconds(lambda _: call()) / bench.ceiling.bandwidth
            figure = f"{100 * share:5.1f} %"
        except Exception as error:
            figure = short(error)
        print(f"{'>' if tiles == now else ' '} {name:24} {tuple(tiles)!s:24} {figure}", flush=True)
    setattr(module, table, now)


def norms(bench: Bench, hidden: int) -> None:
    x, residual, grad, weight = (drawn(*shape) for shape in [(TOKENS, hidden)] * 3 + [(hidden,)])
    values = list(itertools.product((2048, 4096, 8192), (8, 16, 32)))

    def forward(added: Tensor | None) -> list[Tensor]:
        outputs = rms_norm.rms_norm_forward(x, added, weight, EPS, 0.0)
        return [x, *outputs[:1]] if added is None else [x, added, *outputs]

    def backward(added: Tensor | None) -> list[Tensor]:
        found, _ = rms_norm.rms_norm_backward((grad, added), x, weight, EPS, 0.0, False)
        return [x, grad, found] if added is None else [x, grad, added, found]

    for name, added in (("", None), ("add_", residual)):
        sweep(bench, f"{name}rms_norm forward", rms_norm, "FORWARD", values, lambda added=added: forward(added))
        sweep(bench, f"{name}rms_norm backward", rms_norm, "BACKWARD", values, lambda added=added: backward(added))


def ropes(bench: Bench) -> None:
    fused, grad_q, grad_k = drawn(TOKENS, 48, 128), drawn(TOKENS, 32, 128), drawn(TOKENS, 8, 128)
    q, k = fused[:, :32], fused[:, 32:40]
    cos, sin, weight = drawn(TOKENS, 128), drawn(TOKENS, 128), drawn(128)
    rotation, norm = rope._Rotation(cos, sin, False), rope._Norm(weight, weight, EPS, 0.0)
    values = list(itertools.product((2048, 4096), (8, 16, 32, 64)))
    angles = [cos[:, :64], sin[:, :64]]

    def forward(norm: rope._Norm | None) -> list[Tensor]:
        outputs = rope._outputs(q, k)
        rope._launch((q, k), outputs, rotation, norm)
        return [q, k, *angles, *outputs]

    def backward() -> list[Tensor]:
        outputs = rope._outputs(q, k)
        rope._launch_norm_backward((grad_q, grad_k), (q, k), outputs, rotation, norm, False)
        return [grad_q, grad_k, q, k, *angles, *outputs]

    sweep(bench, "rope", rope, "FORWARD", values, lambda: forward(None))
    sweep(bench, "norm_rope forward", rope, "FORWARD", values, lambda: forward(norm))
    sweep(bench, "norm_rope backward", rope, "NORM_BACKWARD", values, backward)


def glus(bench: Bench, inner: int) -> None:
    gate, up, grad_h = (drawn(TOKENS, inner) for _ in range(3))
    values = [(1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (4096, 16)]
    for activation in ("silu", "gelu_tanh"):
        sweep(
            bench,
            f"{activation} forward",
            glu,
            "FORWARD",
            values,
            lambda activation=activation: [gate, up, glu.glu_forward(gate, up, activation)],
        )
        sweep(
            bench,
            f"{activation} backward in place",
            glu,
            "BACKWARD",
            values,
            lambda activation=activation: 2 * glu.glu_backward_(grad_h, gate, up, activation),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=["rms_norm", "rope", "glu"], default=["rms_norm", "rope", "glu"])
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--inner", type=int, default=9728)
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    began, ceiling = time.monotonic(), measure_ceiling(device)
    print(f"{torch.cuda.get_device_name()}: a copy moves {ceiling.bandwidth / 1e9:.0f} GB/s")
    bench = Bench(device, ceiling, float("inf"))
    sweeps = {
        "rms_norm": lambda: norms(bench, arguments.hidden),
        "rope": lambda: ropes(bench),
        "glu": lambda: glus(bench, arguments.inner),
    }
    for name in arguments.only:
        sweeps[name]()
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
