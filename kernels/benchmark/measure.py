"""Correctness first, then time on the GPU as a share of its ceiling, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.kernels.benchmark.case import Case, Function

GATE = 2.0
"""Times the error of plain torch."""
FLOOR = 1e-6
"""Relative error that counts as none."""
FLUSHED = 256 * 2**20
"""Bytes read before each timed call, and of copies that a small weight is rotated through: four times an H200's L2."""
AHEAD = 2_000_000
"""Clock cycles, about a millisecond, that the GPU waits so that the host is ahead with its launches."""


class Row(NamedTuple):
    """One implementation, one direction. ``note`` stands in place of the figures where there are none."""

    op: str
    shape: str
    direction: str
    by: str
    error: float | None = None
    seconds: float | None = None
    rate: str = ""
    share: float | None = None
    extra: float | None = None
    wanted: str = ""
    note: str = ""


class Ceiling(NamedTuple):
    """What this GPU reaches: bytes a second read and written by a copy, and operations a second of a large product."""

    bandwidth: float
    products: float


@dataclass(slots=True)
class Bench:
    """Where it runs, against which ceiling, and until when."""

    device: torch.device
    ceiling: Ceiling
    deadline: float
    without: Sequence[str] = ()
    unsloth: bool = False
    """Measure Unsloth and nothing else."""

    def rows(self, case: Case) -> Iterator[Row]:
        """Ours first, then the others, each forward and, where there are gradients, backward."""
        blank = Row(case.op, case.shape, "", "")
        implementations = self._implementations(case)
        if not implementations:
            return
        if time.monotonic() > self.deadline:
            yield blank._replace(by="all", note="skipped: no time left")
            return
        try:
            inputs = case.inputs()
            tail = _tail(case, inputs)
            exact = results(case, case.plain, [_wide(tensor) for tensor in tail])
            plain = [distance(*pair) for pair in zip(results(case, case.plain, tail), exact)]
        except Exception as error:
            yield blank._replace(by="torch", note=short(error))
            return
        for name, make in implementations.items():
            row = blank._replace(by=name, wanted=case.wanted if name == "ours" else "")
            if time.monotonic() > self.deadline:
                yield row._replace(note="skipped: no time left")
                continue
            try:
                function = make()
                ratio = None if name in case.ungated else self.gate(case, function, inputs, exact, plain)
                if ratio is not None and ratio > GATE:
                    yield row._replace(note=f"wrong: {ratio:.3g} times torch's error")
                    continue
                yield from self.timed(case, function, inputs, row._replace(error=ratio))
            except Exception as error:
                yield row._replace(note=short(error))

    def _implementations(self, case: Case) -> dict[str, Callable[[], Function]]:
        if self.unsloth:
            return {"unsloth": case.unsloth} if case.unsloth else {}
        found: dict[str, Callable[[], Function]] = {
            "ours": case.ours,
            "torch": lambda: case.plain,
            "compile": lambda: torch.compile(case.plain, dynamic=False),
            **case.others,  # last: some work in place, and the inputs are not the same afterwards
        }
        return {name: make for name, make in found.items() if name not in (*self.without, *case.left_out)}

    def gate(
        self, case: Case, function: Function, inputs: Sequence[Tensor], exact: list[Tensor], plain: list[float]
    ) -> float:
        """The worst of all outputs and gradients, in errors of plain torch."""
        found = results(case, function, inputs, case.tail)
        assert len(found) == len(exact), f"{len(found)} results instead of {len(exact)}"
        errors = [distance(*pair) for pair in zip(found, exact)]
        return max(error / max(base, FLOOR) for error, base in zip(errors, plain))

    def timed(self, case: Case, function: Function, inputs: Sequence[Tensor], row: Row) -> Iterator[Row]:
        """Forward; where an input wants a gradient, backward and the memory of both."""
        copies = self.copies(case, inputs)
        seconds = self.seconds(lambda _: [function(*each) for each in copies]) / len(copies)
        extra = self.extra(lambda: function(*inputs))
        if row.by in case.ungated:
            yield self.figures(case, row, "both", 2, seconds, extra)
            return
        yield self.figures(case, row, "forward", 0, seconds, extra)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        if not wanted:
            return

        def forward() -> tuple[list[Tensor], list[Tensor]]:
            outputs = as_list(function(*inputs))[: case.outputs]
            return outputs, [torch.ones_like(output) for output in outputs]

        def backward(state: tuple[list[Tensor], list[Tensor]]) -> object:
            return torch.autograd.grad(state[0], wanted, state[1])

        after = self.seconds(backward, forward)
        extra = self.extra(lambda: backward(forward()))
        yield self.figures(case, row, "backward", 1, after, extra)
        yield self.figures(case, row, "both", 2, seconds + after, extra)

    def figures(self, case: Case, row: Row, direction: str, index: int, seconds: float, extra: float) -> Row:
        """The row with a rate: bytes where the case counts bytes, else operations."""
        counted = (*case.work, sum(case.work))[index]
        rate = counted / seconds
        if case.bound == "bytes":
            text, share = f"{rate / 1e9:.0f} GB/s", rate / self.ceiling.bandwidth
        else:
            text, share = f"{rate / 1e12:.0f} TFLOP/s", rate / self.ceiling.products
        return row._replace(direction=direction, seconds=seconds, rate=text, share=share, extra=extra)

    def copies(self, case: Case, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
        """The inputs; with a rotated one, so many copies of it that L2 has forgotten the first when it is back."""
        if not case.rotated or self.device.type == "cpu":
            return [list(inputs)]
        count = -(-FLUSHED // inputs[case.rotated[0]].nbytes)
        return [
            [tensor.clone() if index in case.rotated else tensor for index, tensor in enumerate(inputs)]
            for _ in range(count)
        ]

    def seconds(self, call: Callable[..., object], prepare: Callable[[], object] = lambda: None) -> float:
        """Median of ``call(prepare())``, without ``prepare``'s own time."""
        if self.device.type == "cpu":
            state, began = prepare(), time.perf_counter()
            call(state)
            return time.perf_counter() - began
        for _ in range(2):
            call(prepare())
        torch.cuda.synchronize()
        began = time.perf_counter()
        call(prepare())
        torch.cuda.synchronize()
        repeats = int(min(25, max(4, 0.15 / (time.perf_counter() - began))))
        flushed = torch.ones(FLUSHED // 4, dtype=torch.int32, device=self.device)
        events = []
        for _ in range(repeats):
            state = prepare()
            flushed.sum()  # read, not written: no dirty lines on their way out during the call
            torch.cuda._sleep(AHEAD)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call(state)
            end.record()
            del state
            events.append((start, end))
        torch.cuda.synchronize()
        return median(start.elapsed_time(end) for start, end in events) / 1e3

    def extra(self, call: Callable[[], object]) -> float:
        """Peak MiB beyond what was allocated before; 0 on a CPU."""
        if self.device.type == "cpu":
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def results(case: Case, function: Function, inputs: Sequence[Tensor], rows: int | None = None) -> list[Tensor]:
    """Outputs and input gradients, in copies of the inputs since some work in place; of the last ``rows`` alone.

    The gradients that come in are random in those rows, and drawn alike for all implementations.
    """
    own = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    outputs = as_list(function(*own))[: case.outputs]
    kept = [output.detach()[-rows:].clone() if rows else output.detach().clone() for output in outputs]
    wanted = [tensor for tensor in own if tensor.requires_grad]
    if not wanted:
        return kept
    gradients = []
    for index, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(index)
        count = rows or output.shape[0]
        drawn = torch.randn(count, *output.shape[1:], generator=generator, device=output.device)
        gradient = torch.ones_like(output)
        gradient[-count:] = drawn
        gradients.append(gradient)
    found = torch.autograd.grad(outputs, wanted, gradients)
    return kept + [gradient[-rows:].clone() if rows else gradient for gradient in found]


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative, in the Euclidean norm; infinite where something is not finite."""
    assert found.shape == exact.shape, f"{tuple(found.shape)} instead of {tuple(exact.shape)}"
    error = ((found.float() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """What a function returned, as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def measure_ceiling(device: torch.device) -> Ceiling:
    """A copy of 2 GiB and a product of 8192³ in bfloat16, on random data."""
    if device.type == "cpu":
        return Ceiling(1e9, 1e9)
    bench = Bench(device, Ceiling(1, 1), 0)
    source = torch.randn(2**29, device=device)
    bandwidth = 2 * source.nbytes / bench.seconds(lambda target: target.copy_(source), lambda: torch.empty_like(source))
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return Ceiling(bandwidth, 2 * 8192**3 / bench.seconds(lambda _: a @ b))


def short(error: Exception) -> str:
    """Kind and first line, fit for a cell."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}".replace("|", "/")


def _tail(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The last ``case.tail`` rows of every input that has as many rows as the first: rows do not know each other."""
    if case.tail is None:
        return list(inputs)
    rows = inputs[0].shape[0]
    return [
        tensor[-case.tail :].detach().requires_grad_(tensor.requires_grad)
        if tensor.ndim and tensor.shape[0] == rows
        else tensor
        for tensor in inputs
    ]


def _wide(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        return tensor
    return tensor.detach().float().requires_grad_(tensor.requires_grad)
