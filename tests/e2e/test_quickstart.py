"""The quick start as a user runs it, on three seeds: about ten seconds each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.rl.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]
KEYS = [
    "reward/mean",
    "reward/std",
    "reward/correct/mean",
    "rollout/completion_tokens",
    "rollout/truncated",
    "loss/total",
    "policy/entropy",
    "policy/kl_sampler",
    "policy/clip_fraction",
    "perf/tokens_per_second",
    "perf/peak_memory_gib",
    "time/rollout_s",
    "time/train_s",
    "staleness/max",
    "optim/grad_norm",
    "optim/learning_rate",
]


@pytest.fixture(scope="module", params=[0, 1, 2])
def finished(request, tmp_path_factory) -> tuple[RunDir, str]:
    """The run of one seed, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    command = [str(Path(sys.executable).with_name("posttrain")), "train", str(ROOT / "examples" / "quickstart.toml")]
    command += ["--set", f"output_dir={folder}", "--set", f"seed={request.param}"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [run] = folder.iterdir()
    return RunDir(run), done.stdout


@pytest.mark.slow
def test_the_quick_start_learns(finished: tuple[RunDir, str]) -> None:
    run, printed = finished
    rows = run.metrics()
    rewards = [row["reward/mean"] for row in rows if row["step"] >= 1]
    assert rewards[0] < 0.45
    assert sum(rewards[-3:]) / 3 > 0.9
    evaluations = [row["eval/pass@1"] for row in rows if "eval/pass@1" in row]
    assert len(evaluations) >= 2 and evaluations[0] < 0.6 < 0.8 < evaluations[-1]

    assert run.plot_file.read_bytes().startswith(b"\x89PNG") and str(run.plot_file) in printed
    for row in rows[1:]:
        assert all(isinstance(row[key], int | float) for key in KEYS), row["step"]
    assert "sampler and trainer disagree" not in printed and "exp(logprobs" not in printed

    first = rows[1]
    assert first["step"] == 1
    # Old logprobs come from a pass of their own at step 1: the same numbers to the last bit.
    assert first["policy/ratio_max"] == 1.0 and first["policy/ratio_mean"] == 1.0
    assert all(row["policy/ratio_max"] == 1.0 for row in rows[1:])
    assert all(abs(row["policy/kl_sampler"]) < 1e-6 for row in rows[1:])
    assert all(row["staleness/max"] == 0 for row in rows[1:])
