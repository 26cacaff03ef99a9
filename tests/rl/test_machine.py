"""What follows from the machine alone; the rest of ``rl.machine`` is tested through the doctor."""

from __future__ import annotations

import pytest

from posttrain.rl import machine


@pytest.mark.parametrize(
    ("configured", "capability", "expected"),
    [
        ("auto", None, "float32"),
        ("auto", (7, 5), "float16"),
        ("auto", (8, 0), "bfloat16"),
        ("auto", (9, 0), "bfloat16"),
        ("float32", (9, 0), "float32"),
        ("float64", None, "float64"),
    ],
)
def test_dtype_of_a_model_on_a_device(configured: str, capability: tuple[int, int] | None, expected: str):
    assert machine.dtype_name(configured, capability) == expected
