"""Metrics on their way to another process."""

from __future__ import annotations

from dataclasses import astuple

import torch

from posttrain.rl.metrics import Max, Mean, Std, Sum, on_host, values


def test_on_the_host_metrics_are_plain_numbers_that_merge_as_before() -> None:
    tensors = {
        "mean": Mean(torch.tensor(0.1, dtype=torch.float32), torch.tensor(3)),
        "sum": Sum(torch.tensor(2.5, dtype=torch.float64)),
        "max": Max(torch.tensor(-1.5)),
        "std": Std.of([1.0, 2.0, 4.0]),
        "plain": Mean(7.0, 2),
    }
    moved = on_host(tensors)
    assert values(moved) == values(tensors)
    assert [type(metric) for metric in moved.values()] == [Mean, Sum, Max, Std, Mean]
    assert all(isinstance(part, float | int) for metric in moved.values() for part in astuple(metric))
    assert moved["mean"].merge(Mean(0.2, 1)).value() == (torch.tensor(0.1).item() + 0.2) / 4
