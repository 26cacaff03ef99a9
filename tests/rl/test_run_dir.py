"""The run directory: whole at any moment, whatever is killed."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from posttrain.rl.errors import CheckpointError, ConfigError
from posttrain.rl.run_dir import RunDir
from posttrain.rl.timeline import Span


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "run", {"steps": 3, "rollout": {"group_size": 4}})


def save(run: RunDir, step: int, text: str = "w", keep: int | None = None) -> None:
    with run.checkpoint(step, keep=keep) as folder:
        (folder / "weights").write_text(text)
        (folder / "state.json").write_text(json.dumps({"step": step}))


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints_dir.iterdir())


def test_configuration_comes_back_and_relative_paths_start_from_the_given_folder(tmp_path: Path) -> None:
    tree = {"steps": 3, "data": {"dataset": "rows.jsonl", "worked_turns": [{"role": "user", "content": "1+1 = é\n"}]}}
    RunDir.create(tmp_path, "a", tree, base=tmp_path / "configs")
    run = RunDir.open(tmp_path / "a")
    assert run.config() == tree
    assert run.base() == tmp_path / "configs"
    run.write_config({**tree, "steps": 9})
    assert run.config()["steps"] == 9


def test_relative_paths_start_from_the_working_directory_by_default(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir.create("runs", "a", {})
    monkeypatch.chdir("/")
    assert RunDir.open(tmp_path / "runs" / "a").base() == tmp_path
    assert run.path == Path("runs/a")


def test_default_names_are_dates_and_never_collide(tmp_path: Path) -> None:
    runs = {RunDir.create(tmp_path, None, {}).path.name for _ in range(5)}
    assert len(runs) == 5
    assert all(name.startswith("20") and name[10] == "_" for name in runs)


def test_a_folder_with_something_in_it_is_refused_with_a_remedy(tmp_path: Path) -> None:
    RunDir.create(tmp_path, "a", {"steps": 1})
    with pytest.raises(ConfigError, match=r"not empty.*--resume"):
        RunDir.create(tmp_path, "a", {"steps": 2})
    assert RunDir.open(tmp_path / "a").config() == {"steps": 1}
    (tmp_path / "empty").mkdir()
    assert RunDir.create(tmp_path, "empty", {}).config_file.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_a_run_name_is_one_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="plain folder name"):
        RunDir.create(tmp_path, name, {})


def test_an_output_dir_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another output_dir"):
        RunDir.create(tmp_path / "file", "a", {})


def test_opening_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such run"):
        RunDir.open(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"no config\.toml"):
        RunDir.open(tmp_path)


def test_an_unreadable_configuration_or_origin_is_named(run: RunDir) -> None:
    run.config_file.write_text("steps = ")
    with pytest.raises(CheckpointError, match=r"config\.toml: cannot be read"):
        run.config()
    run.origin_file.unlink()
    with pytest.raises(CheckpointError, match=r"origin\.json: cannot be read"):
        run.base()


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_lines_keep_order_and_write_no_invalid_json(run: RunDir) -> None:
    run.append_metrics(1, {"reward/mean": 0.1, "a/nan": math.nan, "a/inf": -math.inf, "rollout/groups": 4})
    assert run.metrics_file.read_text() == (
        '{"step": 1, "reward/mean": 0.1, "a/nan": null, "a/inf": null, "rollout/groups": 4}\n'
    )
    run.append_metrics(2, {"reward/mean": 1 / 3})
    assert run.metrics()[1] == {"step": 2, "reward/mean": 1 / 3}


def test_every_line_is_on_file_when_append_returns(run: RunDir) -> None:
    for step in range(5):
        run.append_metrics(step, {"x": 1.0})
        assert len(RunDir(run.path).metrics()) == step + 1


@pytest.mark.parametrize("torn", ['{"step": 2, "rewa', "{", '{"step": 2, "a": 1.0}', "\x00\x00"])
def test_a_torn_last_line_is_left_out_and_the_next_line_starts_afresh(run: RunDir, torn: str) -> None:
    run.append_metrics(1, {"a": 1.0})
    with run.metrics_file.open("a") as file:
        file.write(torn)
    assert [row["step"] for row in run.metrics()] == [1]
    RunDir.open(run.path).append_metrics(7, {"a": 2.0})
    assert run.metrics() == [{"step": 1, "a": 1.0}, {"step": 7, "a": 2.0}]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(run: RunDir) -> None:
    run.metrics_file.write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2"):
        run.metrics()


def test_truncation_forgets_later_metrics_samples_and_evaluations(run: RunDir) -> None:
    for step in range(6):
        run.append_metrics(step, {"a": float(step)})
        run.write_rollouts(step, [{"step": step}])
        run.write_rollouts(step, [{"step": step}], evaluation=True)
    run.append_metrics(4, {"eval/pass@1": 0.5})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 3, "torn')
    before = run.metrics_file.read_text().splitlines(keepends=True)
    run.truncate_after(3)
    assert run.metrics_file.read_text() == "".join(before[:4])
    assert sorted(path.name for path in run.rollouts_dir.iterdir()) == sorted(
        f"{kind}_{step:06d}.jsonl" for kind in ("step", "eval") for step in range(4)
    )
    run.append_metrics(4, {"a": 40.0})
    assert [row["a"] for row in run.metrics()] == [0.0, 1.0, 2.0, 3.0, 40.0]


def test_truncation_before_anything_was_written(run: RunDir) -> None:
    run.truncate_after(0)
    assert run.metrics() == []


def test_rollout_tables_come_back_with_nan_as_null_and_unknown_values_as_text(run: RunDir) -> None:
    run.write_rollouts(120, [{"a": math.nan, "b": [1.0, math.inf], "c": {"d": Path("x")}, "e": "é"}])
    assert (run.path / "rollouts" / "step_000120.jsonl").is_file()
    assert run.rollouts(120) == [{"a": None, "b": [1.0, None], "c": {"d": "x"}, "e": "é"}]
    assert run.rollouts(121) == []


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_appear_whole_and_only_the_newest_are_kept(run: RunDir) -> None:
    assert run.latest_checkpoint() is None
    for step in (5, 10, 15, 1_000_000):
        save(run, step, keep=2)
    assert names(run) == ["step_000015", "step_1000000"]
    assert run.latest_checkpoint() == (1_000_000, run.path / "checkpoints" / "step_1000000")


def test_nothing_is_visible_while_a_checkpoint_is_written(run: RunDir) -> None:
    save(run, 1)
    with run.checkpoint(2) as folder:
        (folder / "state.json").write_text("{}")
        latest = RunDir.open(run.path).latest_checkpoint()
        assert latest is not None and latest[0] == 1
        assert folder.exists()  # a reader that opens the run leaves the writer's folder alone
    assert run.latest_checkpoint() == (2, run.checkpoint_dir(2))


@pytest.mark.parametrize("error", [ValueError("disk"), KeyboardInterrupt()])
def test_an_exception_leaves_the_older_checkpoints_and_no_trace(run: RunDir, error: BaseException) -> None:
    save(run, 1)
    with pytest.raises(type(error)), run.checkpoint(2, keep=1) as folder:
        (folder / "state.json").write_text("{}")
        raise error
    assert names(run) == ["step_000001"]


def test_a_checkpoint_without_state_is_refused(run: RunDir) -> None:
    with pytest.raises(CheckpointError, match=r"no readable state\.json"), run.checkpoint(2) as folder:
        (folder / "weights").write_text("w")
    assert names(run) == []


def test_rewriting_a_step_replaces_it(run: RunDir) -> None:
    save(run, 4, "old")
    save(run, 4, "new", keep=1)
    assert names(run) == ["step_000004"]
    assert (run.checkpoint_dir(4) / "weights").read_text() == "new"


def test_a_rewrite_that_dies_between_its_two_renames_gives_the_old_one_back(run: RunDir, monkeypatch) -> None:
    save(run, 4, "old")
    rename = Path.rename

    def fail_second(self: Path, target: Path) -> Path:
        if self.name.startswith(".partial_"):
            raise OSError("pulled the plug")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OSError, match="plug"):
        save(run, 4, "new")
    monkeypatch.undo()
    assert names(run) == ["step_000004"]
    assert (run.checkpoint_dir(4) / "weights").read_text() == "old"


def test_opening_clears_what_a_killed_writer_left(run: RunDir) -> None:
    save(run, 4, "old")
    run.checkpoint_dir(4).rename(run.checkpoints_dir / ".replaced_step_000004")
    (run.checkpoints_dir / ".partial_step_000004").mkdir()
    (run.checkpoints_dir / ".partial_step_000004" / "state.json").write_text("{}")
    (run.path / ".partial_metrics.jsonl").write_text("half")
    reopened = RunDir.open(run.path)
    assert names(run) == ["step_000004"]
    assert reopened.latest_checkpoint() == (4, run.checkpoint_dir(4))
    assert (run.checkpoint_dir(4) / "weights").read_text() == "old"
    assert not (run.path / ".partial_metrics.jsonl").exists()


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "\xff"])
def test_a_corrupt_checkpoint_is_passed_over_with_a_warning(run: RunDir, content: str | None) -> None:
    save(run, 1)
    save(run, 2)
    state = run.checkpoint_dir(2) / "state.json"
    state.unlink()
    if content is not None:
        state.write_bytes(content.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match="step_000002"):
        assert run.latest_checkpoint() == (1, run.checkpoint_dir(1))
    (run.checkpoint_dir(1) / "state.json").unlink()
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match="no checkpoint"):
        run.latest_checkpoint()


def test_a_path_is_found_as_a_run_or_as_one_of_its_checkpoints(run: RunDir) -> None:
    save(run, 3)
    found, checkpoint = RunDir.find(run.checkpoint_dir(3))
    assert (found.path, checkpoint) == (run.path, run.checkpoint_dir(3))
    assert RunDir.find(run.path)[1] is None
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        RunDir.find(run.checkpoint_dir(4))


WRITER = """
import json, os, sys
from posttrain.rl.run_dir import RunDir
from posttrain.rl.timeline import Span
run = RunDir.open(sys.argv[1])
print("ready", flush=True)
step = int(sys.argv[2])
while True:
    step += sys.argv[3] == "new"
    with run.lock(), run.checkpoint(step, keep=2) as folder:
        (folder / "state.json").write_text(json.dumps({"step": step, "token": (token := os.urandom(8).hex())}))
        for part in range(3):
            (folder / f"part_{part}").write_text(token * 20_000)
    run.append_metrics(step, {"x": 1.0})
"""


def write_parts(folder: Path, step: int, token: str) -> None:
    (folder / "state.json").write_text(json.dumps({"step": step, "token": token}))
    for part in range(3):
        (folder / f"part_{part}").write_text(token * 20_000)


def assert_whole(folder: Path, step: int) -> str:
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == step
    for part in range(3):
        assert (folder / f"part_{part}").read_text() == state["token"] * 20_000
    return state["token"]


@pytest.mark.parametrize("mode", ["new", "same"])
def test_kill_at_random_moments_leaves_a_whole_checkpoint(run: RunDir, mode: str) -> None:
    script = run.path.parent / "writer.py"
    script.write_text(WRITER)
    dice = random.Random(mode)
    with run.checkpoint(1) as folder:
        write_parts(folder, 1, "ab")
    reached, tokens = 1, {"ab"}
    for _ in range(12):
        child = subprocess.Popen(
            [sys.executable, str(script), str(run.path), str(reached), mode], stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(dice.uniform(0.0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        found = RunDir.open(run.path).latest_checkpoint()
        assert found is not None and found[0] >= reached
        reached = found[0]
        tokens.add(assert_whole(found[1], reached))
        assert all(name.startswith("step_") for name in names(run))
        assert all(set(row) == {"step", "x"} for row in run.metrics())
    assert len(tokens) > 1  # the children did get somewhere


def write_and_die(run: RunDir, operation: int) -> None:
    """In a forked child: replace step 4, add step 5, prune; killed just before its ``operation``-th file operation."""
    left = operation

    def die(event: str, _: object) -> None:
        nonlocal left
        if event == "open" or event.startswith(("os.", "shutil.")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    for step, token in ((4, "new"), (5, "newest")):
        with run.checkpoint(step, keep=1) as folder:
            write_parts(folder, step, token)


def test_kill_before_each_file_operation_leaves_a_whole_checkpoint(run: RunDir) -> None:
    order = [(4, "old"), (4, "new"), (5, "newest")]
    seen: list[tuple[int, str]] = []
    for operation in range(1, 400):
        shutil.rmtree(run.checkpoints_dir, ignore_errors=True)
        with run.checkpoint(4) as folder:
            write_parts(folder, 4, "old")
        child = os.fork()
        if child == 0:
            try:
                write_and_die(RunDir(run.path), operation)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        found = RunDir.open(run.path).latest_checkpoint()
        assert found is not None, f"killed before operation {operation}: no checkpoint"
        seen.append((found[0], assert_whole(found[1], found[0])))
        assert all(name.startswith("step_") for name in names(run))
        if os.WIFEXITED(status):
            break
    assert operation > 40
    assert seen == sorted(seen, key=order.index)  # never backwards
    assert set(seen) == set(order)


# -- the lock ---------------------------------------------------------------------------------------------------------


def test_two_writers_exclude_each_other_and_the_message_names_the_process(run: RunDir) -> None:
    other = RunDir(run.path)
    with run.lock():
        with run.lock():  # reentrant in one object
            pass
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"), other.lock():
            pass
        with pytest.raises(CheckpointError, match="in use"), other.checkpoint(1):
            pass
    with other.lock():
        pass


def test_the_lock_dies_with_its_process(run: RunDir) -> None:
    code = (
        "import sys, time; from posttrain.rl.run_dir import RunDir; run = RunDir(sys.argv[1])\n"
        "with run.lock():\n    print('locked', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"locked\n"
    with pytest.raises(CheckpointError, match=f"process {child.pid}"), run.lock():
        pass
    child.kill()
    child.wait()
    child.stdout.close()
    with run.lock():
        save(run, 1)
    assert run.latest_checkpoint() is not None


def test_opening_while_another_holds_the_lock_reads_without_clearing(run: RunDir) -> None:
    save(run, 1)
    with run.lock():
        (run.checkpoints_dir / ".partial_step_000002").mkdir()
        assert RunDir.open(run.path).latest_checkpoint() == (1, run.checkpoint_dir(1))
        assert (run.checkpoints_dir / ".partial_step_000002").exists()


def test_metrics_can_be_read_while_they_are_written(run: RunDir) -> None:
    def write() -> None:
        for step in range(300):
            run.append_metrics(step, {"x": float(step)})

    thread = threading.Thread(target=write)
    thread.start()
    seen = 0
    while thread.is_alive():
        rows = RunDir(run.path).metrics()
        assert [row["step"] for row in rows] == list(range(len(rows)))
        seen = max(seen, len(rows))
    thread.join()
    assert len(run.metrics()) == 300 >= seen


# -- timeline ----------------------------------------------------------------------------------------------------------


def test_spans_of_each_step_on_a_line(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run", {})
    first, second = [Span("rollout", 0.5, 2.25)], [Span("rollout", 3.0, 4.5), Span("train", 4.5, 5.0000004)]
    run.append_timeline(1, first)
    run.append_timeline(2, second)
    lines = (run.path / "logs" / "timeline.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 2, "spans": [["rollout", 3.0, 4.5], ["train", 4.5, 5.0]]}
    assert run.timeline(1) == first
    assert run.timeline(2) == [Span("rollout", 3.0, 4.5), Span("train", 4.5, 5.0)]
    assert run.timeline(3) == []


def test_spans_of_steps_to_be_repeated_are_forgotten_and_a_torn_line_is_cut(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run", {})
    for step in (1, 2, 3):
        run.append_timeline(step, [Span("train", float(step), step + 0.5)])
    run.truncate_after(2)
    assert [len(run.timeline(step)) for step in (1, 2, 3)] == [1, 1, 0]
    with run.timeline_file.open("a") as file:
        file.write('{"step": 3, "sp')
    again = RunDir.open(run.path)
    again.append_timeline(3, [Span("train", 9.0, 9.5)])
    assert again.timeline(3) == [Span("train", 9.0, 9.5)]
