"""Activation checkpointing: a decoder layer keeps its input alone, on its device or in pinned host memory.

The backward pass of a layer runs its forward pass again, this time with a graph. The operations and their order are
those of the plain model, so the gradients are bitwise the same; they reach the parameters as ever, hooks and all.

Copies to and from the host run on a stream of their own, beside the products of the layer. Where a copy's source or
target on the device is given up, the main stream waits for the copy first: the allocator may hand that memory to the
next layer, however far the host is ahead (``record_stream`` would keep it until the GPU gets there). The wait costs
nothing: a layer's input is in use until its end in any case, and a copy takes a tenth of the layer's time.

Shape letters: T packed tokens, H hidden.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from posttrain.rl.errors import EngineError

log = logging.getLogger(__name__)

SEGMENT = 256 * 2**20
"""Bytes of host memory that are pinned at once: a power of two, which torch's pinned allocator rounds up to."""
REMEDY = "set trainer.activation_checkpointing = false"
OUTPUT_USED: ContextVar[bool] = ContextVar("OUTPUT_USED", default=True)
"""False while a layer runs for the sake of its graph alone: the value that it returns is not looked at."""


def checkpoint_layers(backbone: nn.Module, device: torch.device, *, offload: bool = False) -> HostMemory | None:
    """Recompute each decoder layer in its backward pass; with ``offload`` their inputs wait in host memory.

    The last layer's input stays where it is: it is needed at once. Raises ``EngineError`` for a model without layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise EngineError(f"{type(backbone).__name__} has no layers to recompute: {REMEDY}")
    memory = HostMemory(device) if offload else None
    log.info("%d layers are recomputed%s", len(layers), ", their inputs wait in host memory" if offload else "")
    for layer in layers:
        layer.forward = _Recomputing(layer, memory, stays=memory is None or layer is layers[-1])
    return memory


class HostMemory:
    """Where inputs of layers wait: segments of pinned memory, filled one after the other and reused when all are back.

    Copies go through one stream and are therefore done in the order in which they are asked for, so that memory may be
    written again as soon as the copy out of it has been queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.latest: weakref.ref[_Copy] | None = None
        """What was sent last, and is therefore needed first."""
        self.waiting = 0
        """Copies in here."""
        self._segments: list[Tensor] = []
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(segment.nbytes for segment in self._segments)

    def send(self, tensor: Tensor) -> _Copy:
        """Start to copy ``tensor``; whoever lets go of it calls ``sent`` before."""
        copy = _Copy(self, tensor)
        self.latest = weakref.ref(copy)
        return copy

    def take(self, size: int) -> list[Tensor]:
        """Room for ``size`` bytes, in one piece or several."""
        start, end = self._used, self._used + size
        while self.nbytes < end:
            self._segments.append(torch.empty(SEGMENT, dtype=torch.uint8, pin_memory=self.stream is not None))
        pieces = []
        while start < end:
            index, low = divmod(start, SEGMENT)
            pieces.append(self._segments[index][low : low + end - start])
            start += len(pieces[-1])
        self._used = end
        self.waiting += 1
        return pieces

    def give_back(self) -> None:
        """One copy less. The last one leaves all of the room free."""
        self.waiting -= 1
        if self.waiting == 0:
            self._used = 0

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is queued within runs beside what the current stream does from here on, and after what it did."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """What the current stream does from here on comes after every copy so far."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


class _Copy:
    """A tensor in host memory, from ``send`` to ``take``; dropped in between, it leaves nothing behind."""

    def __init__(self, memory: HostMemory, tensor: Tensor) -> None:
        self._memory, self._shape, self._dtype, self._device = memory, tensor.shape, tensor.dtype, tensor.device
        self._source: Tensor | None = None
        self._arriving: Tensor | None = None
        self._pieces: list[Tensor] = []
        self._pieces = memory.take(tensor.nbytes)
        self._source = tensor.reshape(-1).view(torch.uint8)
        with memory.beside():
            for piece, part in zip(self._pieces, _cut(self._source, self._pieces)):
                piece.copy_(part, non_blocking=True)

    def sent(self) -> None:
        """The tensor may go: its memory is not used again before it has been copied."""
        self._memory.join()
        self._source = None

    def fetch(self) -> None:
        """Start to copy back, unless that has been done."""
        if self._arriving is not None or not self._pieces:
            return
        self._arriving = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        target = self._arriving.view(-1).view(torch.uint8)
        with self._memory.beside():
            for piece, part in zip(self._pieces, _cut(target, self._pieces)):
                part.copy_(piece, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor, back on its device; once."""
        self.fetch()
        tensor = self._arriving
        assert tensor is not None, "a layer's input is given back once: no second backward pass"
        self._release()
        return tensor

    def _release(self) -> None:
        if self._arriving is not None:
            self._memory.join()
        if self._pieces:
            self._memory.give_back()
        self._arriving, self._source, self._pieces = None, None, []

    def __del__(self) -> None:
        self._release()


def _cut(flat: Tensor, pieces: list[Tensor]) -> tuple[Tensor, ...]:
    return flat.split([len(piece) for piece in pieces])


class _Recomputing:
    """Stands in for a layer's ``forward``."""

    def __init__(self, layer: nn.Module, memory: HostMemory | None, *, stays: bool) -> None:
        self._layer, self._forward, self._memory, self._stays = layer, layer.forward, memory, stays

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``hidden_states`` […, H] and whatever else the layer takes."""
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        others = {key: value for key, value in given.items() if isinstance(value, Tensor) and value.requires_grad}
        parameters = [parameter for parameter in self._layer.parameters() if parameter.requires_grad]
        if not torch.is_grad_enabled() or not (hidden_states.requires_grad or others or parameters):
            return self._forward(hidden_states, *args, **kwargs)

        def run(hidden: Tensor, *values: Tensor) -> Any:
            now = {**given, **dict(zip(others, values))}
            return self._forward(hidden, *(now.pop(index) for index in range(len(args))), **now)

        with _unchanged(self._layer, given):
            return _Recomputed.apply(
                run, self._memory, self._stays, len(others), hidden_states, *others.values(), *parameters
            )


class _Recomputed(torch.autograd.Function):
    """A layer run without a graph, and with one when its gradient is asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Any],
        memory: HostMemory | None,
        stays: bool,
        others: int,
        hidden: Tensor,
        *tensors: Tensor,
    ) -> Any:
        """``tensors``: the layer's other arguments with a gradient, then its trained parameters."""
        ctx.run, ctx.others = run, others
        ctx.earlier = None if memory is None else memory.latest
        ctx.copy = None if stays or memory is None else memory.send(hidden)
        output = run(hidden, *tensors[:others])
        if ctx.copy is not None:
            ctx.copy.sent()
        ctx.save_for_backward(*([hidden] if ctx.copy is None else []), *tensors)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        hidden = saved.pop(0) if ctx.copy is None else ctx.copy.take()
        if ctx.earlier is not None and (earlier := ctx.earlier()) is not None:
            earlier.fetch()  # the layer before this one; it arrives while this one is computed
        needed = ctx.needs_input_grad[4:]
        inputs = [tensor.detach() for tensor in (hidden, *saved[: ctx.others])]
        for tensor, wanted in zip(inputs, needed):
            tensor.requires_grad_(wanted)
        with torch.enable_grad(), _output_unused():
            outputs = ctx.run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ends = [(get_gradient_edge(y), g) for y, g in zip(outputs, gradients, strict=True) if g is not None]
        del outputs, hidden  # the values are of no use, only the way to them is
        sources = [*inputs, *saved[ctx.others :]]
        asked = [tensor for tensor, wanted in zip(sources, needed, strict=True) if wanted]
        found = iter(
            torch.autograd.grad([y for y, _ in ends], asked, [g for _, g in ends], allow_unused=True) if ends else ()
        )
        return (None,) * 4 + tuple(next(found, None) if wanted else None for wanted in needed)


@contextmanager
def _output_unused() -> Iterator[None]:
    token = OUTPUT_USED.set(False)
    try:
        yield
    finally:  # where a layer failed, the next forward pass needs its outputs
        OUTPUT_USED.reset(token)


@contextmanager
def _unchanged(layer: nn.Module, given: dict[Any, Any]) -> Iterator[None]:
    """Refuse a layer that hands something on by writing into its arguments: there is no gradient through that."""
    before = [(value, dict(value)) for value in given.values() if isinstance(value, MutableMapping)]
    yield
    for value, was in before:
        if value.keys() != was.keys() or any(value[key] is not was[key] for key in was):
            raise EngineError(f"{type(layer).__name__} hands state to later layers and cannot be recomputed: {REMEDY}")
