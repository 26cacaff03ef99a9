"""The benchmark reports no time of what is wrong, and a row for whatever goes wrong."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from posttrain.kernels import bench
from posttrain.kernels.benchmark.case import SIZES, Case, imported
from posttrain.kernels.benchmark.measure import Bench, Ceiling, Row, results

SIZE = 7


def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def case(**changes) -> Case:
    """y = x² of 7 × 5 numbers: 2 bytes a number read and written, half precision."""

    def inputs():
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(SIZE, 5, generator=generator).half().requires_grad_()]

    made = Case("square", "7×5", inputs, lambda: square, square, (140, 210), tail=2, wanted="fast")
    return replace(made, **changes)


def rows(made: Case, seconds: float = 60, **settings) -> list[Row]:
    settings = {"without": ("torch", "compile"), **settings}
    measured = Bench(torch.device("cpu"), Ceiling(1e9, 1e9), time.monotonic() + seconds, **settings)
    return list(measured.rows(made))


def test_what_is_right_gets_a_time_in_each_direction():
    found = rows(case())
    assert [row.direction for row in found] == ["forward", "backward", "both"]
    assert all(row.note == "" and row.seconds > 0 and row.error == pytest.approx(1.0) for row in found)
    assert found[2].seconds == pytest.approx(found[0].seconds + found[1].seconds)
    assert found[0].share == pytest.approx(140 / found[0].seconds / 1e9)
    assert {row.wanted for row in found} == {"fast"}


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0] * 2.02


class WrongForward(WrongBackward):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = x * x
        y[-1, -1] *= 1.1
        return y

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0] * 2


@pytest.mark.parametrize("wrong", [WrongForward, WrongBackward])
def test_what_is_wrong_gets_none(wrong):
    [row] = rows(case(ours=lambda: wrong.apply))
    assert row.note.startswith("wrong: ") and row.seconds is None


def test_not_a_number_is_wrong():
    [row] = rows(case(ours=lambda: lambda x: x * x * float("nan")))
    assert row.note.startswith("wrong: inf")


def test_what_is_missing_or_fails_is_said_and_the_rest_goes_on():
    def broken():
        raise RuntimeError("no such kernel | on this GPU\nmore")

    found = rows(case(others={"liger": lambda: imported("no_such_package.ops:Norm"), "cublas": broken}))
    assert [row.by for row in found] == ["ours"] * 3 + ["liger", "cublas"]
    assert found[3].note == "no_such_package is not installed"
    assert found[4].note == "RuntimeError: no such kernel / on this GPU"


def test_after_the_deadline_the_rest_is_skipped():
    [row] = rows(case(), seconds=-1)
    assert row.note == "skipped: no time left"


def test_unsloth_is_measured_alone():
    assert rows(case(), unsloth=True) == []
    assert {row.by for row in rows(case(unsloth=lambda: square), unsloth=True)} == {"unsloth"}


def test_a_measure_that_is_not_the_op_has_no_gate():
    found = rows(case(others={"cublas": lambda: lambda x: x.detach()}, ungated=("cublas",)))
    assert found[-1].direction == "both" and found[-1].error is None and found[-1].seconds > 0


def test_gradients_of_the_last_rows_are_those_of_the_last_rows_alone():
    """Random in the rows that are compared, whoever computes how many."""
    made = case()
    [x] = made.inputs()
    whole = results(made, square, [x], 2)
    tail = results(made, square, [x[-2:].detach().requires_grad_()])
    assert all(torch.equal(one, two) for one, two in zip(whole, tail, strict=True))
    assert whole[1].unique().numel() == 10


def test_the_table_puts_others_beside_ours():
    table = bench.Table()
    table.head(Ceiling(4.3e12, 7.8e14))
    table.add(Row("square", "7×5", "forward", "ours", 1.0, 2e-6, "70 GB/s", 0.5, 1.0, "fast"))
    last = table.add(Row("square", "7×5", "forward", "liger", 1.5, 5e-6, "28 GB/s", 0.2, 3.0))
    assert last == "| square | 7×5 | forward | liger | 1.50 | 5.0 | 2.50 | 28 GB/s | 20 | 3 |  |"
    assert table.lines[0] == "copy 4.30 TB/s, bfloat16 products 780 TFLOP/s"
    note = table.add(Row("square", "7×5", "", "unsloth", note="unsloth is not installed"))
    assert note.count("|") == last.count("|")


@pytest.mark.parametrize("op", bench.OPS)
def test_plain_torch_of_every_case_is_what_float32_is_compared_with(op):
    """Every case can be made at a tiny size, and plain torch agrees with itself."""
    for made in bench.OPS[op](SIZES["tiny"]):
        without = ("ours", "compile", *made.others)
        left_out = tuple(name for name in made.left_out if name != "torch")
        found = rows(replace(made, left_out=left_out), without=without)
        assert found and all(row.by == "torch" and row.note == "" and row.error == 0 for row in found), found
