"""The examples run as their heads say, end where they promise, and stay short enough to read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .loading import EXAMPLES, load


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lines"), [("basic", 60), ("loop", 150)])
def test_the_script_learns_to_count(name: str, lines: int, tmp_path: Path):
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) <= lines
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reward = re.search(r"reward of the last step: ([\d.]+)", done.stdout)
    assert reward is not None, done.stdout
    assert float(reward[1]) > 0.9


@pytest.fixture(scope="module")
def addition():
    return load("smollm2_addition")


@pytest.fixture(scope="module")
def chain_sum():
    return load("smollm2_chain_sum")


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<answer>12</answer>", 1.0),
        (" <answer>12</answer>\n", 1.0),
        ("<answer>13</answer>", 0.0),
        ("12", 0.0),
        ("The sum is <answer>12</answer>", 0.0),
        ("<answer>12</answer><answer>12</answer>", 0.0),
        ("<answer>012</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_addition_is_scored_strictly(addition, completion: str, score: float):
    assert addition.correct(completion, answer="12") == score


def test_addition_has_every_sum_of_two_digits_once(addition):
    problems = addition.problems()
    assert len({problem["prompt"] for problem in problems}) == len(problems) == 81
    assert {"prompt": "What is 9 + 9?", "answer": "18"} in problems
    assert sum(int(problem["answer"]) for problem in problems) == 810


def test_chain_sum_has_every_sum_and_difference_of_two_digits_once(chain_sum):
    pytest.importorskip("reasoning_gym")
    problems = {problem["prompt"]: problem["answer"] for problem in chain_sum.problems()}
    digits = range(10)
    expected = {f"{a} {sign} {b}": a + b if sign == "+" else a - b for a in digits for b in digits for sign in "+-"}
    assert problems == {chain_sum.QUESTION.format(sum): str(answer) for sum, answer in expected.items()}
