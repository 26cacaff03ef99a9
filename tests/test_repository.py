"""The repository keeps its own rules: linters, layers, types, and a wheel that holds the whole package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["lint-imports"], ["mypy", "-p", "posttrain"]],
    ids=lambda command: " ".join(command),
)
def test_the_linters_are_satisfied(command: list[str]):
    tool = BIN / command[0]
    if not tool.exists():
        pytest.skip(f"{command[0]} is not installed here")
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_holds_every_module_and_nothing_else(tmp_path: Path):
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack what an older tree left there
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=500)
    (wheel,) = tmp_path.glob("posttrain-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    folders = ("rl", "rollout", "kernels", "trainer")
    ours = {f"posttrain/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in held if name.endswith(".py")} == ours | {"posttrain/__init__.py"}
    assert "posttrain/py.typed" in held


def test_the_test_command_of_the_readme_is_what_ci_runs():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv .venv")]
    assert len(lines) == 2
    assert [("pytest" in line, "posttrain train" in line) for line in lines] == [(False, True), (True, False)]


def test_the_readme_shows_a_reward_and_a_call_at_once():
    head = (ROOT / "README.md").read_text().splitlines()[:25]
    assert any("@rl.reward" in line for line in head)
    assert any("rl.train(" in line for line in head)
