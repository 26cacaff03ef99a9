"""The public door: its names, and that looking through it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from posttrain import rl

NAMES = ["ALGORITHMS", "Algorithm", "Config", "PosttrainError", "RunResult", "metric", "reward", "train"]


def test_names_are_pinned() -> None:
    assert rl.__all__ == NAMES == dir(rl)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_leads_somewhere(name: str) -> None:
    home = getattr(rl, name)
    assert getattr(sys.modules[rl._HOMES[name]], name) is home


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'trian'; it offers ALGORITHMS, .*train"):
        rl.trian  # noqa: B018


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("from posttrain import rl", ["torch", "ray", "transformers", "datasets", "pydantic", "matplotlib"]),
        ("from posttrain import rl; rl.reward", ["torch", "ray", "transformers", "datasets"]),
        ("from posttrain import rl; rl.Config(model='a/b')", ["torch", "ray", "transformers", "datasets"]),
        ("from posttrain.rl import cli", ["torch", "ray", "transformers", "datasets", "pydantic"]),
        ("from posttrain import rl; rl.train", ["ray", "vllm", "wandb", "matplotlib"]),
    ],
)
def test_what_is_not_needed_is_not_imported(code: str, absent: list[str]) -> None:
    check = f"{code}\nimport sys\nfound = [name for name in {absent} if name in sys.modules]\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_is_typed_and_has_a_version() -> None:
    import importlib.metadata
    import importlib.resources

    import posttrain

    assert (importlib.resources.files("posttrain") / "py.typed").is_file()
    assert posttrain.__version__ == importlib.metadata.version("posttrain")
