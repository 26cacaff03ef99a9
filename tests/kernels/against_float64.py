"""A differentiable kernel held against the same formula in float64, the error of plain torch being the measure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.kernels.kernel_tests import DEVICE, distance

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers as the middle columns of a wider tensor."""
    generator = torch.Generator().manual_seed(seed)
    wider = torch.randn(*shape[:-1], shape[-1] + 5, generator=generator).to(dtype).to(DEVICE)
    return wider[..., 2:-3]


def assert_error_is_at_most_twice_torchs(ours: Function, plain: Function, inputs: list[Tensor]) -> None:
    """Of outputs and gradients. ``plain``: torch in the type of its inputs, as a model would do it, and so in float64.

    The gradients of the outputs are columns of wider tensors, as the inputs may be: leaves keep their strides. The
    floor is what a float32 sum may lose.
    """
    outputs = _tuple(plain(*inputs))
    grads = [drawn(*output.shape, dtype=output.dtype, seed=seed) for seed, output in enumerate(outputs, 7)]
    exact = _results(plain, [x.double() for x in inputs], [grad.double() for grad in grads])
    theirs, found = (_results(function, inputs, grads) for function in (plain, ours))
    for index, (mine, their, right) in enumerate(zip(found, theirs, exact, strict=True)):
        assert mine.dtype == their.dtype and mine.shape == right.shape, index
        floor = 8 * torch.finfo(torch.float32).eps * (right.abs().max().item() if right.numel() else 0.0)
        assert distance(mine, right) <= 2 * distance(their, right) + floor, index


def _results(function: Function, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = _tuple(function(*leaves))
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, grads))]


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
