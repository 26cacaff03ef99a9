"""``posttrain rewards``: the listing, and trials of built-ins and of a file's own function."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.rl import rewards_cli
from posttrain.rl.cli import app
from posttrain.rl.errors import RewardError
from posttrain.rl.rewards import registry

OWN = """
from posttrain.rl.rewards import explains, reward

@reward
def share(completion: str, answer: str, letters: list, bonus: float = 0.0) -> float:
    return sum(letter in completion for letter in letters) / len(letters) + bonus

@explains(share)
def why(completion: str, letters: list) -> str:
    return "missing " + " ".join(letter for letter in letters if letter not in completion)
"""


def run(*arguments: str, code: int = 0, given: str | None = None) -> str:
    result = CliRunner().invoke(app, ["rewards", *arguments], input=given)
    assert result.exit_code == code, result.output
    return result.output + (result.stderr if code else "")


def test_the_list_names_every_built_in_with_its_arguments() -> None:
    rows = {row[0]: row[1:] for row in rewards_cli.listing()}
    assert rows["exact"][0] == "completion, answer" and rows["exact"][2] == "built in"
    assert rows["regex_format"][0] == "settings: pattern, name"
    assert all(does for _, does, _ in rows.values())
    assert "math_answer" in run("list")


def test_the_list_shows_a_factory_that_another_package_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("their_format", "posttrain.rl.rewards.text_format:regex_format", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    rows = {row[0]: row[1:] for row in rewards_cli.listing()}
    assert rows["their_format"] == (*rows["regex_format"][:2], "posttrain.rl.rewards.text_format:regex_format")


def test_a_trial_shows_score_time_and_explanation(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    output = run(
        "try", f"{tmp_path}/own.py:share", "--completion", "-", "--answer", "a", "--column", 'letters=["a","b"]',
        "--setting", "bonus=0.25", given="cab",
    )  # fmt: skip
    assert "score  1.25\n" in output and " ms\n" in output and "because  missing \n" in output


def test_settings_and_numbers_reach_a_built_in() -> None:
    assert "score  1\n" in run("try", "regex_format", "--completion", "aa", "--setting", "pattern=a+")
    assert "score  0\n" in run("try", "exact", "--completion", "7", "--answer", "8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exact", "--completion", "a"), "asks for answer"),
        (("exat", "--completion", "a"), "did you mean exact"),
        (("exact", "--completion", "a", "--column", "answer"), "--column answer: write NAME=VALUE"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: tuple[str, ...], message: str) -> None:
    assert message in run("try", *arguments, code=2)


def test_a_bug_in_the_function_is_shown(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def broken(completion):\n    return 1 / 0\n")
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        rewards_cli.attempt(f"{tmp_path}/broken.py:broken", "a", {}, {})
