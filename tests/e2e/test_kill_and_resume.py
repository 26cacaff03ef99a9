"""``kill -9`` at any moment, then ``posttrain train --resume RUN``: exactly the metrics of a run nobody touched."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.rl.run_dir import RunDir

from .forks import PATIENCE, Fault, Forks, wait_until

CONFIG = Path(__file__).with_name("tiny.toml")
STEPS = 8
OVERLAPPED = ("--set", "rollout.max_staleness=1")
MODES = {"on_policy": (), "overlapped": OVERLAPPED}
SEED = 20261122

FORWARD = "posttrain.trainer.trainer:Trainer.forward_backward"
GENERATE = "posttrain.rollout.transformers_engine:TransformersEngine.stream"
LOAD_ADAPTER = "posttrain.rollout.transformers_engine:TransformersEngine.load_adapter"
SAVE = "posttrain.trainer.trainer:Trainer.save"
SAVE_STATE = "posttrain.rl.service.state:write"
SYNC = "posttrain.rl.run_dir:sync"
SYNC_TREE = "posttrain.rl.run_dir:sync_tree"
REPLACE = "posttrain.rl.run_dir:RunDir._replace"
REMOVE = "posttrain.rl.run_dir:_remove"
APPEND = "posttrain.rl.run_dir:RunDir.append_metrics"
ROLLOUTS = "posttrain.rl.run_dir:RunDir.write_rollouts"
SAVE_MODEL = "transformers:PreTrainedModel.save_pretrained"

MOMENTS = {
    # Two epochs a step: calls 1 to 12 of forward_backward are the warm start's, 13 and 14 step 1's, and so on.
    "the random model is written": Fault(SAVE_MODEL),
    "the random model was written, its tokenizer not": Fault(SAVE_MODEL, 1, "kill_after"),
    "the first warm-up step": Fault(FORWARD),
    "late in the warm start": Fault(FORWARD, 11),
    "the first weights are published": Fault(LOAD_ADAPTER, 1),
    "the first evaluation": Fault(GENERATE, 1),
    "before the first checkpoint's files": Fault(SAVE, 1),
    "between the two updates of step 1": Fault(FORWARD, 14),
    "weights of step 3 in the engine, step not logged": Fault(LOAD_ADAPTER, 4, "kill_after"),
    "step 4 logged, its samples not": Fault(ROLLOUTS, 7),
    "step 5 before its line": Fault(APPEND, 6),
    "the second checkpoint has weights but no state": Fault(SAVE_STATE, 2),
    "the second checkpoint is whole, not yet on the disk": Fault(SYNC_TREE, 2),
    "the second checkpoint is not yet in place": Fault(REPLACE, 2),
    "the second checkpoint is in place": Fault(REPLACE, 2, "kill_after"),
    "an old checkpoint is removed": Fault(REMOVE, 9),
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def references(forks: Forks, tmp_path_factory) -> dict[str, RunDir]:
    """One run of each mode that nobody touched."""
    folder = tmp_path_factory.mktemp("references")
    for mode, options in MODES.items():
        assert forks.run(new_run(folder, mode, *options)) == 0
    return {mode: RunDir(folder / mode) for mode in MODES}


def new_run(folder: Path, name: str, *options: str) -> list[str]:
    return ["train", str(CONFIG), "--set", f"output_dir={folder}", "--set", f"run_name={name}", *options]


def reproducible(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}


def assert_same_run(run: RunDir, reference: RunDir, how: str = "") -> None:
    rows, expected = run.metrics(), reference.metrics()
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == list(range(STEPS + 1)), how
    for row, wanted in zip(rows, expected, strict=True):
        assert list(reproducible(row).items()) == list(reproducible(wanted).items()), f"{how}: step {row['step']}"
    tables, wanted_tables = (sorted(r.rollouts_dir.glob("*.jsonl")) for r in (run, reference))
    assert [path.name for path in tables] == [path.name for path in wanted_tables], how
    for path, wanted_path in zip(tables, wanted_tables, strict=True):
        assert path.read_bytes() == wanted_path.read_bytes(), f"{how}: {path.name}"
    kept = sorted(path.name for path in run.checkpoints_dir.iterdir())
    assert kept == sorted(path.name for path in reference.checkpoints_dir.iterdir()) == ["step_000006", "step_000008"]
    for name in ("adapter_model.safetensors", "state.json"):
        ours, theirs = (r.checkpoint_dir(STEPS) / name for r in (run, reference))
        assert ours.read_bytes() == theirs.read_bytes(), f"{how}: {name}"
    assert not list(run.path.rglob(".partial_*")) and not list(run.path.rglob(".replaced_*")), how


def test_the_reference_learns_something_and_exercises_every_part(references: dict[str, RunDir]) -> None:
    """Equality with a run in which nothing moves would say nothing."""
    for mode, run in references.items():
        rows = run.metrics()
        assert len({row["optim/grad_norm"] for row in rows[1:]}) == STEPS
        assert all(row["optim/grad_norm"] > 0 for row in rows[1:])
        assert any(row["rollout/groups"] > 3 for row in rows[1:]), "dynamic sampling refilled at least once"
        assert [row["step"] for row in rows if "eval/pass@1" in row] == [0, 3, 6, 8]
        assert rows[0]["loss/warm_start"] > 0
        staleness = [row["staleness/max"] for row in rows[1:]]
        assert staleness == ([0.0] * STEPS if mode == "on_policy" else [0.0] + [1.0] * (STEPS - 1))
    first, second = (run.metrics()[-1]["loss/total"] for run in references.values())
    assert first != second


def test_two_untouched_runs_are_equal(forks: Forks, references: dict[str, RunDir], tmp_path: Path) -> None:
    for mode, options in MODES.items():
        assert forks.run(new_run(tmp_path, mode, *options)) == 0
        assert_same_run(RunDir(tmp_path / mode), references[mode])


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(moment: str, forks: Forks, references: dict[str, RunDir], tmp_path: Path) -> None:
    assert forks.run(new_run(tmp_path, "run"), MOMENTS[moment]) == -signal.SIGKILL
    run = RunDir(tmp_path / "run")
    assert forks.run(["train", "--resume", run.path]) == 0
    assert_same_run(run, references["on_policy"], moment)


@pytest.mark.parametrize(
    "fault",
    [Fault(FORWARD, 17), Fault(GENERATE, 6), Fault(SAVE, 3), Fault(SAVE_STATE, 2), Fault(REPLACE, 3, "kill_after")],
    ids=["training", "sampling", "before a checkpoint", "in a checkpoint", "after a checkpoint"],
)
def test_killed_while_generation_runs_ahead(
    fault: Fault, forks: Forks, references: dict[str, RunDir], tmp_path: Path
) -> None:
    assert forks.run(new_run(tmp_path, "run", *OVERLAPPED), fault) == -signal.SIGKILL
    run = RunDir(tmp_path / "run")
    assert forks.run(["train", "--resume", run.path]) == 0
    assert_same_run(run, references["overlapped"])


def test_killed_when_everything_is_done_but_the_plot(
    forks: Forks, references: dict[str, RunDir], tmp_path: Path
) -> None:
    plot = Fault("posttrain.rl.plot:write_reward_plot")
    assert forks.run(new_run(tmp_path, "run", "--set", "logging.plot=true"), plot) == -signal.SIGKILL
    run = RunDir(tmp_path / "run")
    assert not run.plot_file.exists()
    assert forks.run(["train", "--resume", run.path]) == 0
    assert_same_run(run, references["on_policy"])
    assert run.plot_file.read_bytes().startswith(b"\x89PNG")


def test_a_line_torn_by_the_kill_is_written_again(forks: Forks, references: dict[str, RunDir], tmp_path: Path) -> None:
    assert forks.run(new_run(tmp_path, "run"), Fault(APPEND, 6)) == -signal.SIGKILL
    run = RunDir(tmp_path / "run")
    with run.metrics_file.open("ab") as file:
        file.write(json.dumps({"step": 5, "reward/mean": 0.5}).encode()[:-7])
    assert forks.run(["train", "--resume", run.path]) == 0
    assert_same_run(run, references["on_policy"])


@pytest.mark.parametrize("mode", MODES)
def test_killed_again_and_again_at_random_moments(
    mode: str, forks: Forks, references: dict[str, RunDir], tmp_path: Path
) -> None:
    chance = random.Random(f"{SEED}/{mode}")
    run, kills = RunDir(tmp_path / "run"), []
    arguments = new_run(tmp_path, "run", *MODES[mode])
    for lines in sorted(chance.randrange(1, STEPS) for _ in range(4)):
        pause = chance.uniform(0, 0.05)
        kills.append((lines, round(pause, 4)))
        process = forks.start(arguments)
        wait_until(lambda wanted=lines: lines_of(run) >= wanted, f"{lines} lines of metrics")
        time.sleep(pause)
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, kills
        arguments = ["train", "--resume", str(run.path)]
    assert forks.run(arguments) == 0, kills
    assert_same_run(run, references[mode], f"seed {SEED}, killed after {kills}")


def test_killed_from_outside_while_a_checkpoint_is_written(
    forks: Forks, references: dict[str, RunDir], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    process = forks.start(new_run(tmp_path, "run"), Fault(SAVE_STATE, 3, "stall"))
    partial = run.checkpoints_dir / ".partial_step_000004"
    wait_until(lambda: (partial / "trainer.pt").exists(), "a half-written checkpoint")
    assert not (partial / "state.json").exists()
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert run.latest_checkpoint()[0] == 2
    assert forks.run(["train", "--resume", run.path]) == 0
    assert_same_run(run, references["on_policy"])


def test_a_finished_run_resumed_stays_as_it_is(forks: Forks, references: dict[str, RunDir], tmp_path: Path) -> None:
    assert forks.run(new_run(tmp_path, "run")) == 0
    assert forks.run(["train", "--resume", tmp_path / "run"]) == 0
    assert_same_run(RunDir(tmp_path / "run"), references["on_policy"])


@pytest.mark.parametrize("mode", MODES)
def test_ctrl_c_saves_and_the_resumed_run_is_equal(
    mode: str, forks: Forks, references: dict[str, RunDir], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    process = forks.start(new_run(tmp_path, "run", "--set", "checkpoint.every=0", *MODES[mode]))
    wait_until(lambda: lines_of(run) >= 4, "step 3")
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    saved = run.latest_checkpoint()[0]
    assert 3 <= saved < STEPS and run.metrics()[-1]["step"] == saved
    assert "stopping" in process.output() and "Traceback" not in process.output()
    assert forks.run(["train", "--resume", run.path, "--set", "checkpoint.every=2"]) == 0
    assert_same_run(run, references[mode])


def test_a_second_ctrl_c_ends_at_once(forks: Forks, references: dict[str, RunDir], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    process = forks.start(new_run(tmp_path, "run"), Fault(GENERATE, 7, "stall"))
    wait_until(lambda: lines_of(run) >= 5, "step 4")
    wait_until(lambda: run.latest_checkpoint() and run.latest_checkpoint()[0] == 4, "the checkpoint of step 4")
    process.signal(signal.SIGINT)
    wait_until(lambda: "once more to stop at once" in process.output(), "the word that it stops")
    began = time.monotonic()
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    assert time.monotonic() - began < PATIENCE / 2, "it did not wait for the batch in flight"
    assert forks.run(["train", "--resume", run.path]) == 0
    assert_same_run(run, references["on_policy"])


def test_the_installed_command_killed_and_resumed_equals_the_forked_reference(
    references: dict[str, RunDir], tmp_path: Path
) -> None:
    """The same through real processes: nothing above depends on the fork."""
    command = [str(Path(sys.executable).with_name("posttrain"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = RunDir(tmp_path / "run")
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*command, *new_run(tmp_path, "run")], env=environment, stdout=output, stderr=output, cwd=tmp_path
        )
        wait_until(lambda: lines_of(run) >= 4, "step 3")
        process.kill()
        assert process.wait() == -signal.SIGKILL
        resumed = subprocess.run(
            [*command, "train", "--resume", str(run.path)],
            env=environment,
            cwd=tmp_path,
            stdout=output,
            stderr=output,
            check=False,
        )
    assert resumed.returncode == 0, (tmp_path / "output.txt").read_text()
    assert_same_run(run, references["on_policy"])


def lines_of(run: RunDir) -> int:
    return run.metrics_file.read_bytes().count(b"\n") if run.metrics_file.exists() else 0
