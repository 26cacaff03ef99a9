"""How a test of a kernel runs: compiled on a GPU, interpreted on the host, and compiled for GPUs that are not here.

Triton decides at import whether a kernel is interpreted, so the host's run is a child process: each test file has one
``test_under_the_interpreter`` that calls ``run_interpreted``, and marks the tests of the child with ``runs``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter's bfloat16 is wrong: it adds bit patterns and truncates.
TYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else [])
CAPABILITIES = [75, 80, 89, 90]
"""T4, A100, L4 and RTX 40, H100 and H200."""
SHARED_MEMORY = {75: 64, 80: 163, 89: 99, 90: 227}
"""KiB that one program may have."""


def runs(test):
    """Mark a test that launches kernels: on a GPU, or in the interpreted child."""
    if INTERPRETED:
        return test
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")(test))


def run_interpreted(file: str, at_least: int) -> None:
    """Run ``file``'s tests in a child under the interpreter; ``at_least`` so many must pass."""
    if INTERPRETED or DEVICE == "cuda":
        pytest.skip("the tests of this file run here")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= at_least, done.stdout


def compiled(
    kernel: Any,
    capability: int,
    pointers: dict[str, str],
    constants: dict[str, Any],
    *,
    floats: tuple[str, ...] = (),
    aligned: tuple[str, ...] = (),
    warps: int = 4,
    stages: int = 2,
) -> Any:
    """The kernel compiled for a GPU that need not be here: PTX and cubin in ``.asm``, sizes in ``.metadata``.

    ``pointers``: parameter name to element type ("bf16", "fp32", "i32", "u8", "fp8e4nv"); every parameter that is
    neither a pointer nor in ``constants`` nor in ``floats`` is an int32; ``aligned``: those that are multiples of 16.
    """
    import triton

    signature = {
        name: "constexpr" if name in constants else "fp32" if name in floats else "i32" for name in kernel.arg_names
    }
    signature |= {name: f"*{kind}" for name, kind in pointers.items()}
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *aligned)}
    source = triton.compiler.ASTSource(kernel, signature, constants, hints)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    assert binary.metadata.shared <= SHARED_MEMORY[capability] * 1024
    return binary


@pytest.fixture
def filled_with_nan(monkeypatch):
    """What a kernel forgets to write is NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: filled(empty_like(*a, **k)))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference."""
    return (found.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
