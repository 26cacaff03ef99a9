"""The Colab notebook: a valid, clean file, and its cells run in order on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .loading import EXAMPLES
from .tiny_chat import write_tiny_chat_model

NOTEBOOK = EXAMPLES / "colab_grpo.ipynb"
RUNNER = Path(__file__).parents[1] / "benchmarks" / "colab_on_gpu.py"


@pytest.fixture(scope="module")
def notebook() -> dict:
    return json.loads(NOTEBOOK.read_text())


def test_the_file_is_a_clean_notebook(notebook: dict):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"] == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    assert notebook["metadata"]["colab"]["gpuType"] == "T4"
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", cell["id"]) for cell in cells)
    for cell in cells:
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | (
            {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        )
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), cell["id"], "exec")


def test_the_first_cell_says_what_was_not_tested(notebook: dict):
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "Not tested on a T4" in "".join(first["source"])


def test_its_settings_fit_a_t4(notebook: dict):
    source = "".join(line for cell in notebook["cells"] for line in cell["source"])
    for part in ('"gpu_memory_gib": 14.0', '"DTYPE", "float16"', '"QUANTIZATION", "nf4"', '"ENGINE", "vllm"'):
        assert part in source
    assert "fp8" not in source.partition("no fp8")[2]


def test_its_cells_train_two_steps_on_a_tiny_model(tmp_path: Path):
    model = write_tiny_chat_model(tmp_path / "model")
    command = [sys.executable, str(RUNNER), "--model", str(model), "--engine", "transformers", "--dtype", "float32"]
    command += ["--quantization", "none", "--steps", "2", "--max-tokens", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["steps"] == 2 and len(figures["step_s"]) == 2
    assert figures["kl_sampler_max"] < 1e-6
    assert [f"cell {number}:" in done.stdout for number in range(1, 8)] == [True] * 6 + [False]
