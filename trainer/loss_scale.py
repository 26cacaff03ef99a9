"""Loss scaling for float16: token losses are divided by the step's token count, so their gradients underflow unscaled,
and the layers' amplify them, so a fixed scale overflows (1710.03740, section 3.2).

The scale is the micro-batch's own affair: its gradients are unscaled before they join the others. One that overflows
is run again at a smaller scale, so no batch is lost and the gradient does not depend on the scale's history.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

Result = TypeVar("Result")
log = logging.getLogger(__name__)

FIRST = 4096.0
SMALLEST = 2.0**-10
"""Below that the gradient is not finite for another reason."""
STEP = 8.0
GROWTH_AFTER = 500
"""Micro-batches without an overflow after which the next larger scale is tried again."""


class LossScale:
    """The scale of the next backward pass."""

    def __init__(self) -> None:
        self.value = FIRST
        self._since = 0

    def backward(self, weights: Sequence[nn.Parameter], run: Callable[[float], Result]) -> Result:
        """Call ``run``, which is to leave the gradients of ``scale · loss`` in ``weights``; add the unscaled ones to
        those that were there. Where they are not finite at any scale they are left so: the optimizer names the weight.
        """
        kept = [weight.grad for weight in weights]
        while True:
            for weight in weights:
                weight.grad = None
            result = run(self.value)
            found = [weight.grad for weight in weights if weight.grad is not None]
            finite = not found or bool(torch.isfinite(torch.nn.utils.get_total_norm(found)))
            if finite or self.value <= SMALLEST:
                break
            self.value, self._since = self.value / STEP, 0
            log.info("a float16 gradient overflowed: the micro-batch is run again with a loss scale of %g", self.value)
        if found:
            torch._foreach_mul_(found, 1.0 / self.value)
        for weight, before in zip(weights, kept):
            if before is not None:
                weight.grad = before if weight.grad is None else weight.grad.add_(before)
        self._since += 1
        if self._since >= GROWTH_AFTER and self.value < FIRST:
            self.value, self._since = self.value * STEP, 0
        return result
