"""Functions by name, there and back; scripts, single files, packages; what cannot be found again is refused."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards import BUILT_INS, names, reference, references, registry, resolve
from posttrain.rl.rewards.decorator import is_factory
from posttrain.rl.rewards.math_answer import math_answer
from posttrain.rl.rewards.signature import read

FILE = """
import neighbour
RUNS = open(__file__ + ".runs", "a").write("x")

def good(completion): return neighbour.VALUE

class Grader:
    @staticmethod
    def strict(completion): return 2.0
    def __call__(self, completion): return 3.0

grade = Grader()
number = 5
"""


def here(completion: str) -> float:
    return 7.0


half = functools.partial(here)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("VALUE = 1.0\n")
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    yield path
    sys.modules.pop("neighbour", None)


def test_built_ins_by_name_there_and_back() -> None:
    assert resolve("math_answer") is math_answer
    for name, where in BUILT_INS.items():
        function = references.import_function(where)
        assert reference(function) == name
        assert is_factory(function) or resolve(name) is function


def test_settings_are_bound_to_a_function_and_make_a_factorys_reward() -> None:
    pattern = resolve("regex_format", settings={"pattern": "a+", "name": "only_a"})
    assert (pattern("aaa"), pattern("ab"), read(pattern).name) == (1.0, 0.0, "only_a")
    bound = resolve("ends_with_answer", settings={"answer": "7"})
    assert (
        bound("it is 7") == 1.0 and read(bound).required == ("completion",) and read(bound).name == "ends_with_answer"
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("regex_format", {}, "missing a required argument: 'pattern'"),
        ("regex_format", {"patern": "a"}, r"unexpected keyword argument 'patern'|missing .*'pattern'"),
        ("regex_format", {"pattern": "("}, r"missing \)"),
        ("exact", {"wrong": 1}, r"'wrong' \(it knows: completion, answer\)"),
    ],
)
def test_wrong_settings_are_one_clear_error(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(name, settings=settings)


class Dist:
    name = "their-package"


class Point:
    def __init__(self, name: str, value: str) -> None:
        self.name, self.value, self.dist = name, value, Dist()


def test_an_installed_package_offers_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Point("theirs", "posttrain.rl.rewards.text_format:exact"), Point("exact", "nowhere:nothing")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "posttrain.rewards" else [])
    assert resolve("theirs")("a", answer="a") == 1.0
    assert resolve("exact").__module__ == "posttrain.rl.rewards.text_format", "a built-in is never replaced"
    assert names()["theirs"] == "their-package" and names()["exact"] == "built in"
    points.append(Point("theirs", "other:function"))
    with pytest.raises(ConfigError, match="two packages offer a reward theirs"):
        resolve("theirs")


def test_module_function() -> None:
    assert resolve("posttrain.rl.rewards.math_answer:final_answer")("#### 3") == "3"


def test_file_function_relative_to_base_runs_the_file_once(file: Path) -> None:
    function = resolve("my_rewards.py:good", file.parent)
    assert function("") == 1.0
    assert resolve(f"{file}:good") is function
    assert resolve("./my_rewards.py:Grader.strict", file.parent)("") == 2.0
    assert Path(f"{file}.runs").read_text() == "x", "executed once"


def test_reference_of_a_file_function_resolves_to_it(file: Path) -> None:
    function = resolve("my_rewards.py:good", file.parent)
    assert reference(function) == f"{file}:good"
    assert resolve(reference(function), Path("/")) is function
    grade = resolve(f"{file}:grade")
    assert reference(grade) == f"{file}:grade" and grade("") == 3.0


def test_functions_of_this_module_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (here, half):
        assert resolve(reference(function)) is function


@pytest.mark.parametrize("script", ["direct", "imported"])
def test_function_of_a_script_is_named_by_file_and_found_in_a_new_process(tmp_path: Path, script: str) -> None:
    (tmp_path / "mine.py").write_text("def score(completion):\n    return 0.5\n")
    head = "def score(completion):\n    return 0.5\n" if script == "direct" else "from mine import score\n"
    (tmp_path / "run.py").write_text(
        f"{head}from posttrain.rl.rewards import reference, resolve\n"
        "if __name__ == '__main__':\n"
        "    assert resolve(reference(score)) is score or reference(score).endswith('mine.py:score')\n"
        "    print(reference(score))\n"
    )
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    name = done.stdout.strip()
    assert name == f"{tmp_path / ('run.py' if script == 'direct' else 'mine.py')}:score"
    assert resolve(name)("") == 0.5


def test_lambdas_and_local_functions_are_refused() -> None:
    def local(completion: str) -> float:
        return 0.0

    for function in (local, lambda completion: 0.0, functools.partial(local), "text".upper):
        with pytest.raises(ConfigError, match="found by name when the run is resumed"):
            reference(function)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("math_answr", "did you mean math_answer"),
        ("zzz", "there are .*math_answer.*module:function"),
        ("no_such_module:f", "no module no_such_module"),
        ("posttrain.rl.rewards.math_answer:nope", "has no nope; it has .*final_answer"),
        ("posttrain.rl.rewards.math_answer:TIMEOUT_S", "TIMEOUT_S is float, not a function"),
        ("absent.py:f", "no file .*absent.py"),
        (":f", "module:function"),
    ],
)
def test_what_cannot_be_resolved_says_why(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(spec, tmp_path)


def test_a_file_that_raises_or_lacks_an_import_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needy.py").write_text("import surely_not_installed\n")
    for name, message in (("broken", "ZeroDivisionError"), ("needy", "surely_not_installed")):
        for _ in range(2):  # a second try executes it again instead of finding half a module
            with pytest.raises(ConfigError, match=message):
                resolve(f"{name}.py:f", tmp_path)
