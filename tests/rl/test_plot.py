"""The reward curve."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.rl.plot import series, smooth, write_reward_plot
from posttrain.rl.run_dir import RunDir


def test_series_leaves_out_steps_without_the_metric() -> None:
    rows = [{"step": 0, "eval/pass@1": 0.5}, {"step": 1, "a": 0.25}, {"step": 2, "a": None}, {"step": 3, "a": 0.0}]
    assert series(rows, "a") == ([1, 3], [0.25, 0.0])
    assert series(rows, "b") == ([], [])


def test_smoothing_is_a_weighted_mean_of_what_came_before() -> None:
    assert smooth([0.3] * 5) == pytest.approx([0.3] * 5)
    # weights 0.25, 0.5, 1 of the last three values
    assert smooth([4.0, 0.0, 1.0], weight=0.5) == pytest.approx([4.0, 4 * 0.5 / 1.5, (4 * 0.25 + 1) / 1.75])


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_a_png_is_written(tmp_path: Path, steps: int) -> None:
    run = RunDir.create(tmp_path, "run", {})
    run.append_metrics(0, {"eval/pass@1": 0.25})
    for step in range(1, steps + 1):
        run.append_metrics(step, {"reward/mean": step / 30})
    path = write_reward_plot(run)
    assert path == run.path / "reward.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    pixels = imread(path)
    blue = (pixels[..., 2] > 0.6) & (pixels[..., 0] < 0.3)  # the reward line
    assert (blue.sum() > 500) == (steps == 30)
    assert not list(tmp_path.rglob(".partial*"))
