"""Destinations of figures and samples: files, console, W&B, TensorBoard."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from posttrain.rl.config import LoggingConfig
from posttrain.rl.console import ConsoleSink
from posttrain.rl.errors import ConfigError
from posttrain.rl.run_dir import RunDir
from posttrain.rl.sinks import FileSink, Sinks, TensorboardSink, WandbSink, open_sinks, rollout_rows
from posttrain.rl.types import Completion, Prompt, Rollout, RolloutGroup

OFF = LoggingConfig(console="off")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "run", {"steps": 3})


def group() -> RolloutGroup:
    prompt = Prompt("0-7", [{"role": "user", "content": "2+2?"}], {"answer": "4", "when": Path("x")}, (9, 8))
    first = Completion((5, 6, 2), (-0.5, -0.25, -0.125), "four", "stop", 3)
    second = Completion((5, 5), (-0.5, -4.0), "fiv", "length", 3)
    return RolloutGroup(
        prompt,
        [
            Rollout(
                first, {"correct": 1.0, "style": None}, 1.0, 0.7, counted={"correct": 1.0}, weights={"correct": 1.0}
            ),
            Rollout(second, {"correct": 0.0, "style": 0.5}, 0.5, -0.7, {"correct": "timeout"}),
        ],
    )


def test_a_row_holds_everything_about_a_sample() -> None:
    rows = rollout_rows(12, [group()])
    assert rows[0] == {
        "step": 12,
        "prompt_id": "0-7",
        "prompt": [{"role": "user", "content": "2+2?"}],
        "columns": {"answer": "4", "when": Path("x")},
        "completion": "four",
        "finish_reason": "stop",
        "rewards": {"correct": 1.0, "style": None},
        "counted": {"correct": 1.0},
        "weights": {"correct": 1.0},
        "failures": {},
        "reward": 1.0,
        "advantage": 0.7,
        "completion_length": 3,
        "policy_version": 3,
        "completion_ids": [5, 6, 2],
        "rollout_logprobs": [-0.5, -0.25, -0.125],
    }
    assert rows[1]["failures"] == {"correct": "timeout"}
    assert (rows[1]["completion_length"], rows[1]["finish_reason"], rows[1]["advantage"]) == (2, "length", -0.7)


def test_files_are_always_written(run: RunDir) -> None:
    sinks = open_sinks(OFF, run, 3)
    sinks.log(1, {"reward/mean": 0.5, "policy/kl_sampler": math.nan})
    sinks.rollouts(1, [group()])
    sinks.rollouts(1, [group()], evaluation=True)
    sinks.message("careful")
    sinks.close()
    sinks.close()
    assert run.metrics() == [{"step": 1, "reward/mean": 0.5, "policy/kl_sampler": None}]
    assert [row["completion"] for row in run.rollouts(1)] == ["four", "fiv"]
    assert run.rollouts(1)[0]["columns"] == {"answer": "4", "when": "x"}
    assert run.rollouts(1, evaluation=True)[1]["rollout_logprobs"] == [-0.5, -4.0]
    assert run.messages_file.read_text().endswith(" careful\n")


@pytest.mark.parametrize(
    ("every", "steps", "evaluations"), [(0, [], []), (1, [1, 2, 3, 4], [3]), (2, [2, 4], [3]), (3, [3], [3])]
)
def test_tables_are_written_every_n_steps(run: RunDir, every: int, steps: list[int], evaluations: list[int]) -> None:
    sinks = open_sinks(LoggingConfig(console="off", rollouts_every=every), run, 4)
    for step in range(1, 5):
        sinks.rollouts(step, [group()])
    sinks.rollouts(3, [group()], evaluation=True)
    assert [step for step in range(6) if run.rollouts(step)] == steps
    assert [step for step in range(6) if run.rollouts(step, evaluation=True)] == evaluations


class Recorder:
    """A sink that writes down what it is asked, and raises where told to."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[str] = []
        self.fails = fails

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise OSError(f"{name} failed")

    def start(self, run: RunDir) -> None:
        self._note("start")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._note("log")

    def rollouts(self, step: int, groups: Sequence[RolloutGroup], *, evaluation: bool = False) -> None:
        self._note("rollouts")

    def message(self, text: str) -> None:
        self._note("message")

    def close(self) -> None:
        self._note("close")


@pytest.mark.parametrize("fails", ["log", "rollouts", "message", "close"])
def test_an_optional_sink_that_fails_later_is_reported_once_and_the_run_goes_on(run: RunDir, fails: str) -> None:
    bad, good = Recorder(fails), Recorder()
    sinks = Sinks(run, [good], [bad], rollouts_every=1)
    sinks.start()
    with pytest.warns(RuntimeWarning, match=f"Recorder failed and is switched off.*{fails} failed") as caught:
        for step in range(2):
            sinks.log(step, {})
            sinks.rollouts(step, [])
            sinks.message("text")
        sinks.close()
    assert len(caught) == 1
    assert good.calls == ["start", *["log", "rollouts", "message"] * 2, "close"]
    assert bad.calls.count(fails) == 1 and bad.calls[-1] == fails


def test_a_required_sink_that_fails_stops_the_run(run: RunDir) -> None:
    sinks = Sinks(run, [Recorder("log")], [], rollouts_every=1)
    with pytest.raises(OSError, match="log failed"):
        sinks.log(1, {})


def test_a_sink_that_does_not_start_is_an_error_and_closes_the_others(run: RunDir) -> None:
    first, second, third = Recorder(), Recorder("start"), Recorder()
    with pytest.raises(OSError, match="start failed"):
        Sinks(run, [first], [second, third], rollouts_every=1).start()
    assert (first.calls, second.calls, third.calls) == (["start", "close"], ["start"], [])


# -- console ----------------------------------------------------------------------------------------------------------


def console_of(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=120, highlight=False), text


def ticking(*times: float):
    remaining = iter(times)
    return lambda: next(remaining)


def test_plain_lines_show_the_figures_and_the_time_left(run: RunDir) -> None:
    console, text = console_of(terminal=False)
    sink = ConsoleSink(200, clock=ticking(100.0, 103.0, 108.0, 110.0), console=console)
    sink.start(run)
    values = {"reward/mean": 0.25, "rollout/completion_tokens": 12.34, "perf/tokens_per_second": 1234.5}
    sink.log(
        0, {"warm_start/loss": 1.0, "eval/reward/mean": 0.2, "eval/pass@1": 0.1, "eval/pass@4": 0.4, "eval/n": 9.0}
    )
    sink.log(1, {**values, "policy/kl_sampler": 1.5e-5})
    sink.log(2, {**values, "policy/kl_sampler": 1.5e-5, "policy/kl_ref": 0.011})
    sink.log(3, {**values, "reward/mean": math.nan, "eval/pass@1": 0.75})
    sink.message("[bold]stopping[/bold]")
    sink.log(200, values)
    sink.close()
    assert text.getvalue().splitlines() == [
        f"run {run.path}",
        "evaluation after step 0  reward 0.200  pass@1 0.100  pass@4 0.400",
        "step 1/200  reward 0.250  length 12.3  kl 1.5e-05  tok/s 1,234",
        "step 2/200  reward 0.250  length 12.3  kl 0.011  tok/s 1,234  9m54s left",  # 3 s a step, 198 to go
        "step 3/200  reward –  length 12.3  tok/s 1,234  13m08s left",  # 4 s a step, 197 to go
        "evaluation after step 3  pass@1 0.750",
        "[bold]stopping[/bold]",
        "step 200/200  reward 0.250  length 12.3  tok/s 1,234",
    ]


def test_a_resumed_run_says_so(run: RunDir) -> None:
    console, text = console_of(terminal=False)
    ConsoleSink(5, 3, clock=ticking(), console=console).start(run)
    assert text.getvalue() == f"run {run.path}, going on after step 3\n"


def test_a_terminal_gets_one_live_line_with_the_same_figures(run: RunDir) -> None:
    console, text = console_of(terminal=True)
    sink = ConsoleSink(4, 2, clock=ticking(0.0, 1.0), console=console)
    sink.start(run)
    sink.log(3, {"reward/mean": 0.125})
    sink.message("a message")
    sink.log(4, {"reward/mean": 0.875})
    sink.close()
    shown = text.getvalue()
    assert "\x1b[" in shown and "a message" in shown
    assert "4/4" in shown and "reward 0.875" in shown and "step 4/4" not in shown
    sink.close()


@pytest.mark.parametrize("mode", ["plain", "off"])
def test_no_live_line_where_it_is_not_wanted(run: RunDir, mode: str, capsys) -> None:
    sinks = open_sinks(LoggingConfig(console=mode), run, 2)
    sinks.log(1, {"reward/mean": 0.5})
    sinks.close()
    out = capsys.readouterr().out
    assert ("step 1/2  reward 0.500" in out) == (mode == "plain")
    assert "\x1b" not in out


# -- TensorBoard and W&B ----------------------------------------------------------------------------------------------


def scalars(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.logs_dir / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_the_figures_and_a_resumed_run_replaces_what_it_repeats(run: RunDir) -> None:
    pytest.importorskip("tensorboard")
    config = LoggingConfig(console="off", tensorboard=True)
    sinks = open_sinks(config, run, 4)
    for step in (1, 2, 3):
        sinks.log(step, {"reward/mean": step / 4})
        sinks.rollouts(step, [group()])
    sinks.close()
    resumed = open_sinks(config, run, 4, first_step=2)
    for step in (3, 4):
        resumed.log(step, {"reward/mean": -step / 4})
    resumed.close()
    assert scalars(run) == {"reward/mean": [(1, 0.25), (2, 0.5), (3, -0.75), (4, -1.0)]}


@pytest.mark.parametrize(
    ("sink", "module", "extra"),
    [(WandbSink("p", "offline"), "wandb", "wandb"), (TensorboardSink(0), "torch.utils.tensorboard", "tensorboard")],
)
def test_a_missing_extra_is_named(run: RunDir, monkeypatch, sink, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf'pip install "posttrain\[{extra}\]"'):
        sink.start(run)


class FakeWandb:
    """The parts of W&B that are called."""

    class Settings:
        def __init__(self, **_: object) -> None: ...

    class Table:
        def __init__(self, columns: list[str]) -> None:
            self.columns, self.rows = columns, []

        def add_data(self, *cells: object) -> None:
            self.rows.append(cells)

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.inits, self.logged, self.finished = error, [], [], 0

    def init(self, **arguments: object):
        if self.error:
            raise self.error
        self.inits.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, row: dict) -> None:
        self.logged.append(row)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_on_under_the_same_id_when_resumed(run: RunDir, monkeypatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LoggingConfig(console="off", wandb_project="project", wandb_mode="online")
    sinks = open_sinks(config, run, 4)
    sinks.log(1, {"reward/mean": 0.5})
    sinks.rollouts(1, [group()])
    sinks.close()
    sinks.close()
    open_sinks(config, run, 4, first_step=1).close()
    first, second = fake.inits
    assert first["id"] == second["id"] == run.wandb_id_file.read_text().strip()
    assert (first["resume"], second["resume"]) == (None, "allow")
    assert (first["project"], first["name"], first["config"]) == ("project", "run", {"steps": 3})
    assert fake.finished == 2
    assert fake.logged[0] == {"step": 1, "reward/mean": 0.5}
    table = fake.logged[1]["rollouts"]
    assert table.columns[-2:] == ["reward/correct", "reward/style"]
    assert table.rows[0][1:] == ("four", "stop", 1.0, 0.7, 3, 3, 1.0, None)


def test_wandb_that_does_not_start_says_what_to_do(run: RunDir, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(RuntimeError("no api key")))
    with pytest.raises(ConfigError, match=r"no api key.*wandb login.*offline"):
        open_sinks(LoggingConfig(console="off", wandb_project="p"), run, 4)
    assert not run.wandb_id_file.exists()


def test_wandb_offline_writes_a_run_that_can_be_synchronised_later(run: RunDir) -> None:
    pytest.importorskip("wandb")
    config = LoggingConfig(console="off", wandb_project="project", wandb_mode="offline")
    for first_step in (0, 1):
        sinks = open_sinks(config, run, 2, first_step=first_step)
        sinks.log(first_step + 1, {"reward/mean": 0.5})
        sinks.rollouts(first_step + 1, [group()])
        sinks.close()
    run_id = run.wandb_id_file.read_text().strip()
    written = {path.name for path in (run.logs_dir / "wandb").glob("offline-run-*/run-*.wandb")}
    assert written == {f"run-{run_id}.wandb"}
    tables = [json.loads(path.read_text()) for path in run.logs_dir.rglob("*.table.json")]
    assert tables and tables[0]["data"][0][1] == "four"


def test_the_file_sink_alone_needs_nothing_else(run: RunDir) -> None:
    sink = FileSink()
    sink.start(run)
    sink.log(2, {"a": 1.0})
    assert run.metrics() == [{"step": 2, "a": 1.0}]
