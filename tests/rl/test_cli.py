"""The command line: what is called with what, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from posttrain import __version__
from posttrain.rl import cli
from posttrain.rl.errors import ConfigError, DataError
from posttrain.rl.run_dir import RunDir

CONFIG = """
model = "owner/model"
data = "rows.jsonl"
rewards = ["math_answer"]
steps = 7

[rollout]
group_size = 4
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "configs" / "a.toml"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return path


@pytest.fixture
def service(monkeypatch) -> SimpleNamespace:
    """Stands in for ``rl.service.run``; keeps what it was called with."""
    seen = SimpleNamespace(train=None, evaluate=None, error=None)

    def train(config, *, resume=None, base=None) -> None:
        if seen.error:
            raise seen.error
        seen.train = (config, resume, base)

    def evaluate(config, *, checkpoint=None, base=None) -> dict[str, float]:
        if seen.error:
            raise seen.error
        seen.evaluate = (config, checkpoint, base)
        return {"eval/pass@1": 0.5, "eval/pass@4": 0.75}

    import posttrain.rl.service

    module = SimpleNamespace(train=train, evaluate=evaluate)
    monkeypatch.setitem(sys.modules, "posttrain.rl.service.run", module)
    monkeypatch.setattr(posttrain.rl.service, "run", module, raising=False)
    return seen


@pytest.fixture
def saved_run(tmp_path: Path) -> RunDir:
    tree = {"model": "owner/model", "data": "rows.jsonl", "steps": 5}
    run = RunDir.create(tmp_path, "run", tree, base=tmp_path / "configs")
    for step in (2, 4):
        with run.checkpoint(step) as folder:
            (folder / "state.json").write_text("{}")
    return run


def test_train_passes_the_configuration_with_overrides_and_its_folder(service, config_file: Path) -> None:
    result = call("train", config_file, "--set", "steps=9", "--set", "algorithm=gspo", "--set", "rollout.max_tokens=32")
    assert result.exit_code == 0, result.output
    config, resume, base = service.train
    assert (config.steps, config.algorithm.name, config.rollout.max_tokens) == (9, "gspo", 32)
    assert (config.rollout.group_size, config.model.name) == (4, "owner/model")
    assert (resume, base) == (None, config_file.parent)


def test_resume_needs_only_the_run(service, saved_run: RunDir, tmp_path: Path) -> None:
    result = call("train", "--resume", saved_run.path, "--set", "steps=50")
    assert result.exit_code == 0, result.output
    config, resume, base = service.train
    assert (config.steps, config.model.name) == (50, "owner/model")
    assert (resume, base) == (saved_run.path, tmp_path / "configs")


def test_resume_with_a_configuration_uses_that(service, saved_run: RunDir, config_file: Path) -> None:
    assert call("train", config_file, "--resume", saved_run.path).exit_code == 0
    config, resume, base = service.train
    assert (config.steps, resume, base) == (7, saved_run.path, config_file.parent)


def test_eval_of_a_run_takes_its_newest_checkpoint(service, saved_run: RunDir, tmp_path: Path) -> None:
    result = call("eval", saved_run.path, "--set", "evaluation.samples=2")
    assert result.exit_code == 0, result.output
    assert result.stdout == "eval/pass@1  0.5000\neval/pass@4  0.7500\n"
    config, checkpoint, base = service.evaluate
    assert (config.evaluation.samples, checkpoint, base) == (2, saved_run.checkpoint_dir(4), tmp_path / "configs")


def test_eval_of_one_checkpoint(service, saved_run: RunDir) -> None:
    result = call("eval", saved_run.checkpoint_dir(2), "--json")
    assert json.loads(result.stdout) == {"eval/pass@1": 0.5, "eval/pass@4": 0.75}
    assert service.evaluate[1] == saved_run.checkpoint_dir(2)


def test_eval_of_a_configuration_is_the_untrained_model(service, config_file: Path) -> None:
    assert call("eval", config_file).exit_code == 0
    config, checkpoint, base = service.evaluate
    assert (config.steps, checkpoint, base) == (7, None, config_file.parent)


def test_eval_of_a_run_without_checkpoints_says_so(service, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "new", {"model": "a/b"})
    result = call("eval", run.path)
    assert (result.exit_code, service.evaluate) == (2, None)
    assert "has no checkpoint yet" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "rollout.grop_size=4"], "error: rollout.grop_size: unknown key; did you mean group_size?"),
        (["--set", "nonsense"], "error: --set nonsense: write key=value"),
        (["--set", "rollout.group_size=1"], "error: grpo compares completions of one prompt: rollout.group_size"),
        (["--set", "algorithm=gprs"], "unknown algorithm 'gprs'"),
        (["--set", "steps=0"], "error: steps: Input should be greater than 0 (got 0)"),
        (["--set", "evaluation.every=5"], "error: evaluation.every needs held-out rows"),
    ],
)
def test_mistakes_in_the_configuration_are_one_line(
    service, config_file: Path, change: list[str], message: str
) -> None:
    result = call("train", config_file, *change)
    assert (result.exit_code, service.train) == (2, None)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_each_of_several_mistakes_gets_its_line(service, config_file: Path) -> None:
    result = call("train", config_file, "--set", "steps=0", "--set", "rollout.max_tokens=-1")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "give a configuration, or --resume RUN"),
        (["train", "nowhere.toml"], "nowhere.toml: No such file"),
        (["train", "{tmp}"], "is a folder"),
        (["train", "{tmp}/broken.toml"], "not valid TOML"),
        (["train", "--resume", "{tmp}/nowhere"], "no such run"),
        (["train", "--resume", "{tmp}"], "not a run"),
        (["eval", "{tmp}/nowhere"], "no such run"),
        (["eval", "{tmp}/checkpoints/step_000009"], "not a run"),
        (["doctor", "nowhere.toml"], "No such file"),
    ],
)
def test_wrong_paths_are_one_line(service, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "broken.toml").write_text("steps = = 1")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_000009").mkdir()
    result = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize("error", [ConfigError("does not fit"), DataError("rows lack the column answer")])
def test_what_the_service_refuses_is_one_line(service, config_file: Path, command: str, error: Exception) -> None:
    service.error = error
    result = call(command, config_file)
    assert (result.exit_code, result.stderr) == (2, f"error: {error}\n")


@pytest.mark.parametrize("command", ["train", "eval"])
def test_ctrl_c_exits_with_130(service, config_file: Path, command: str) -> None:
    service.error = KeyboardInterrupt()
    assert call(command, config_file).exit_code == 130


def test_a_defect_keeps_its_traceback(service, config_file: Path) -> None:
    service.error = ZeroDivisionError("ours")
    result = call("train", config_file)
    assert isinstance(result.exception, ZeroDivisionError)


def test_version_and_bare_call() -> None:
    assert call("--version").stdout == f"posttrain {__version__}\n"
    assert "doctor" in call().output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from posttrain.rl import cli\n"
        "sys.argv = ['posttrain', *sys.argv[1:]]\n"
        "try:\n    cli.main()\n"
        "except SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'transformers', 'ray', 'datasets', 'peft', 'numpy', 'matplotlib', 'posttrain.rl.config'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    for arguments in (["--help"], ["train", "--help"], ["eval", "--help"], ["doctor", "--help"], ["--version"]):
        answer = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert answer.stdout.endswith("HEAVY []\n"), answer.stdout


def test_the_installed_command_reports_mistakes_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('model = "x"\nstps = 3\n')
    command = [sys.executable, "-c", "from posttrain.rl.cli import main; main()", "train", str(tmp_path / "a.toml")]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stderr == "error: stps: unknown key; did you mean steps?\n"


def test_doctor_prints_tables_or_json() -> None:
    shown = call("doctor").stdout
    assert "installed" in shown and "OMP_NUM_THREADS" in shown and "transformers" in shown
    tree = json.loads(call("doctor", "--json").stdout)
    assert tree["posttrain"] == __version__
    assert {package["name"] for package in tree["packages"]} >= {"torch", "transformers", "vllm"}


def test_doctor_with_a_configuration_says_whether_it_fits(tmp_path: Path) -> None:
    random_model = (
        "[model.random.config]\nmodel_type = 'qwen3'\nhidden_size = 32\nnum_hidden_layers = 2\nhead_dim = 16\n"
        "num_attention_heads = 2\nnum_key_value_heads = 1\nintermediate_size = 64\nvocab_size = 20\n"
    )
    (tmp_path / "a.toml").write_text(random_model)
    result = call("doctor", tmp_path / "a.toml", "--set", "trainer.device=cpu")
    assert result.exit_code == 0, result.output
    assert "fits; with every prompt and completion at its limit: " in result.stdout
    (tmp_path / "b.toml").write_text('model = "./nowhere"\n')
    result = call("doctor", tmp_path / "b.toml")
    assert result.exit_code == 2 and result.stderr.startswith("error: model.name: there is no folder ./nowhere")
