"""What a user can get wrong, through the real command line: exit 2, one ``error:`` line, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from .forks import Forks

FOLDER = Path(__file__).parent
CONFIG = FOLDER / "tiny.toml"


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


def error_of(forks: Forks, *arguments: str | Path) -> str:
    """The one line of a refused command."""
    process = forks.start(arguments)
    assert process.wait() == 2, process.output()
    lines = [line for line in process.output().splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), process.output()
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_sise=4", "rollout.group_sise: unknown key; did you mean group_size?"),
        ("trainer.learning_rate=fast", "trainer.learning_rate: "),
        ("steps=0", "steps: "),
        ("algorithm=grppo", "algorithm: unknown algorithm"),
        ("rollout.top_p=0.9", None),
        ("rollout.group_size=1", "rollout.group_size must be at least 2"),
        ("data.dataset=nothing.jsonl", "nothing.jsonl: no such file or folder"),
        ("data.dataset=nothing.py:rows", "no file"),
        ("data.dataset=digits.py:rows", "digits.py has no rows; it has"),
        ("data.prompt_column=instruction", "data.prompt_column = 'instruction' is no column of the dataset"),
        ('rewards=["math_answr"]', "math_answr"),
        ('rewards=["digits.py:nothing"]', "digits.py has no nothing; it has"),
        ('rewards=["digits.py:answer_to"]', "reward answer_to"),
        ("rewards=[]", "no rewards"),
        ("data.eval_rows=10", "cannot hold out 10 rows of 10 different prompts"),
        ("warm_start.dataset=digits.py:problems", "set warm_start.completion_column"),
        ("model.random.config.model_type=nonesuch", "model.random.config: "),
        ("trainer.updates_per_batch=2", "must be a multiple of trainer.updates_per_batch"),
        ("evaluation.temperature=0", "set evaluation.samples = 1"),
        ("run_name=a/b", "must be a plain folder name"),
    ],
)
def test_a_wrong_configuration(forks: Forks, tmp_path: Path, override: str, message: str | None) -> None:
    arguments = ["train", CONFIG, "--set", f"output_dir={tmp_path / 'runs'}", "--set", override]
    if message is None:  # truncation is fine until something compares the distributions
        arguments += ["--set", 'algorithm={name="gspo", correction="tis"}']
        message = "cut the sampler's distribution"
    assert message in error_of(forks, *arguments)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_model_that_is_not_there(forks: Forks, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'model = "./no_model"\ndata = "{FOLDER}/digits.py:problems"\nrewards = ["exact"]\n')
    error = error_of(forks, "train", config, "--set", f"output_dir={tmp_path / 'runs'}")
    assert error == f"model.name: no folder {tmp_path}/no_model"
    assert not (tmp_path / "runs").exists()


def test_no_configuration(forks: Forks, tmp_path: Path) -> None:
    assert "give the path of a TOML configuration" in error_of(forks, "train", tmp_path / "none.toml")


def test_a_configuration_that_is_not_toml(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("steps = = 3\n")
    assert "not valid TOML" in error_of(forks, "train", tmp_path / "broken.toml")


def test_nothing_to_resume(forks: Forks, tmp_path: Path) -> None:
    assert "there is no such run" in error_of(forks, "train", "--resume", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "not a run, it has no config.toml" in error_of(forks, "train", "--resume", tmp_path / "empty")


def test_a_run_name_that_is_taken(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    error = error_of(forks, "train", CONFIG, "--set", f"output_dir={tmp_path}", "--set", "run_name=run")
    assert f"{tmp_path}/run is not empty" in error
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_reward_that_fails_is_one_line_too_and_the_run_stays(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def broken(completion):\n    return float('nan')\n")
    process = forks.start(
        ["train", CONFIG, "--set", f"output_dir={tmp_path / 'runs'}", "--set", f'rewards=["{tmp_path}/own.py:broken"]']
    )
    assert process.wait() == 2
    errors = [line for line in process.output().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "reward broken returned nan on" in errors[0]
    assert "Traceback" not in process.output()
    assert len(list((tmp_path / "runs").iterdir())) == 1
