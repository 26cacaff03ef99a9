"""The reward curve, and the phases of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.rl.errors import CheckpointError
from posttrain.rl.plot import series, smooth, write_reward_plot, write_timeline_plot
from posttrain.rl.run_dir import RunDir
from posttrain.rl.timeline import Span


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


def test_the_timeline_of_a_step_is_drawn_to_scale(tmp_path: Path) -> None:
    """Rollout takes three quarters of the step and training one quarter, so their bars are 3 : 1."""
    run = RunDir.create(tmp_path, "run", {})
    run.append_timeline(1, [Span("rollout", 0.0, 4.0)])
    run.append_timeline(2, [Span("rollout", 10.0, 16.0), Span("train", 16.0, 18.0)])
    write_timeline_plot(run, 2, tmp_path / "step.png")
    from matplotlib.image import imread

    pixels = imread(tmp_path / "step.png")[..., :3]

    def width(color: tuple[float, float, float]) -> int:
        return int((abs(pixels - color) < 0.02).all(-1).any(0).sum())

    rollout, train = width((0x1F / 255, 0x77 / 255, 0xB4 / 255)), width((1.0, 0x7F / 255, 0x0E / 255))
    assert rollout > 300 and rollout / train == pytest.approx(3, rel=0.05)


def test_a_step_without_spans_has_no_picture(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run", {})
    with pytest.raises(CheckpointError, match=r"timeline\.jsonl: nothing about step 3"):
        write_timeline_plot(run, 3, tmp_path / "step.png")
    assert not (tmp_path / "step.png").exists()
