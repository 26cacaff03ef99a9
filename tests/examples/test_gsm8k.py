"""The GSM8K example: the file and the script are one run, its rewards, and two steps of it on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain import rl
from posttrain.rl import config as configuration
from posttrain.rl.rewards.signature import read
from posttrain.rl.service import run
from posttrain.rl.service.inputs import Given, gather

from .loading import EXAMPLES, load
from .tiny_chat import write_tiny_chat_model

TOML = EXAMPLES / "gsm8k.toml"
SMALL = {
    "rollout": {"engine": "transformers", "prompts_per_step": 2, "group_size": 4, "max_tokens": 12},
    "evaluation": {"every": 2, "samples": 1, "temperature": 0.0, "max_prompts": 3},
}
ROWS = [
    {"question": f"Tom has {a} apples and buys {b:,}.", "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b:,}"}
    for a, b in ((3, 4), (1, 1200), (20, 5), (7, 7))
]


@pytest.fixture(scope="module")
def example():
    return load("gsm8k")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, rows in (("train", ROWS), ("test", ROWS[:3])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat_model(tmp_path_factory.mktemp("model"))


def tree_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration ``rl.train`` makes of its arguments, rewards left out."""
    data = {**settings["data"], "dataset": settings["dataset"]}
    rest = {key: value for key, value in settings.items() if key not in ("dataset", "data", "rewards")}
    return configuration.from_settings(data=data, **rest).tree()


@pytest.mark.parametrize("algorithm", ["gspo", "grpo"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp8"])
def test_the_file_and_the_script_are_the_same_run(example, algorithm: str, quantization: str):
    arguments = ["--algorithm", algorithm, "--quantization", quantization]
    written = configuration.load(TOML, [f"algorithm={algorithm}", f"model.quantization={quantization}"])
    scripted = tree_of(example.settings(example.parse(arguments)))
    assert scripted == {**written.tree(), "rewards": []}
    assert scripted["algorithm"]["name"] == algorithm
    assert scripted["model"]["quantization"] == quantization
    assert scripted["trainer"]["lora"]["rank"] == 16


def test_the_file_and_the_script_have_the_same_rewards(example, data: Path):
    written = gather(configuration.load(TOML, [f"data.dataset={data}"]), Given(), EXAMPLES)
    handed = {
        read(function).name: read(function).tag.weight
        for function in example.settings(example.parse([]))["rewards"][1:]
    }
    assert written.rubric.combining.weights(0) == {"math_answer": 1.0, "boxed": 0.1} == {"math_answer": 1.0, **handed}
    assert [row["answer"] for row in written.rows] == ["7", "1201", "25", "14"]
    assert written.eval_rows is not None and len(written.eval_rows) == 3


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (r"3 + 4 = 7, so \boxed{7}.", 1.0),
        (r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{7", 0.0),
        (r"} \boxed{7", 0.0),
        (r"\boxed{7} or \boxed{8}", 0.0),
        ("#### 7", 0.0),
        ("", 0.0),
    ],
)
def test_the_format_reward(example, completion: str, score: float):
    assert example.boxed(completion) == score


def test_the_file_trains_two_steps_on_a_local_model_and_folder(data: Path, model: Path, tmp_path: Path):
    overrides = [f"data.dataset={data}", f"model.name={model}", "steps=2", f"output_dir={tmp_path}"]
    for section, values in SMALL.items():
        overrides += [f"{section}.{key}={value}" for key, value in values.items()]
    result = run.train(configuration.load(TOML, overrides), base=EXAMPLES)
    check(result.metrics)


def test_the_script_trains_two_steps_on_a_local_model_and_folder(example, data: Path, model: Path, tmp_path: Path):
    arguments = ["--model", str(model), "--data", str(data), "--algorithm", "grpo", "--steps", "2"]
    settings = {**example.settings(example.parse(arguments)), **SMALL, "output_dir": str(tmp_path)}
    check(rl.train(**settings).metrics)


def check(metrics: list[dict[str, Any]]) -> None:
    """Two steps with an evaluation at either end, every reward reported, each figure what its parts make it."""
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert [row["eval/prompts"] for row in metrics if "eval/prompts" in row] == [3.0, 3.0]
    for row in metrics[1:]:
        parts = row["reward/math_answer/mean"] + 0.1 * row["reward/boxed/mean"]
        assert row["reward/mean"] == pytest.approx(parts)
        assert row["rollout/completion_tokens"] <= 12
