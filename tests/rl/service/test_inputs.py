"""What a run is given, by name or in Python, and what is refused before any model loads."""

from __future__ import annotations

import json

import pytest

from posttrain.rl.config import build
from posttrain.rl.errors import ConfigError, DataError, RewardError
from posttrain.rl.rewards import metric, reward
from posttrain.rl.service.inputs import IN_PYTHON, Given, gather, named_rewards

ROWS = [{"prompt": f"q{index}", "answer": str(index)} for index in range(6)]


def right(completion: str, answer: str) -> float:
    return float(completion == answer)


@reward(weight=0.5)
def brief(completion: str) -> float:
    return float(len(completion) < 3)


def asks_too_much(completion: str, solution: str) -> float:
    return 0.0


def tree(**sections) -> dict:
    return {"model": "no/model", "data": {}, **sections}


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_rows_and_rewards_in_python() -> None:
    gathered = gather(build(tree()), Given(rewards=[right, brief], rows=ROWS), None)
    assert gathered.rubric.combining.weights(0) == {"right": 1.0, "brief": 0.5}
    assert list(gathered.rows) == ROWS and gathered.eval_rows is None and gathered.demonstrations == []


def test_rows_may_come_from_a_generator() -> None:
    gathered = gather(build(tree()), Given(rewards=[right], rows=(row for row in ROWS)), None)
    assert list(gathered.rows) == ROWS


def test_names_are_relative_to_the_configurations_folder(rows_file, tmp_path) -> None:
    (tmp_path / "mine.py").write_text("def exact(completion, answer):\n    return 1.0\n")
    config = build(tree(data="rows.jsonl", rewards=["mine.py:exact"]))
    gathered = gather(config, Given(), tmp_path)
    assert list(gathered.rubric.names) == ["exact"]
    assert [row["prompt"] for row in gathered.rows] == [row["prompt"] for row in ROWS]


def test_a_weight_in_the_configuration_replaces_the_functions_own(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "from posttrain import rl\n@rl.reward(weight=3.0)\ndef a(completion):\n    return 1.0\n"
        "@rl.reward(weight=4.0)\ndef b(completion):\n    return 1.0\n"
    )
    config = build(tree(rewards=[{"name": "mine.py:a", "weight": 0.25}, "mine.py:b"]))
    assert gather(config, Given(rows=ROWS), tmp_path).rubric.combining.weights(0) == {"a": 0.25, "b": 4.0}


GATED = (
    "from posttrain import rl\n"
    "@rl.reward(weight=3.0, requires=['b'], clip=(0, 2))\ndef a(completion):\n    return 1.0\n"
    "@rl.reward\ndef b(completion):\n    return 1.0\n@rl.metric\ndef m(completion):\n    return 1.0\n"
)


def test_gates_clips_and_schedules_of_the_configuration_survive_its_file(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(GATED)
    b = {"name": "mine.py:b", "weight": [[0, 1], [10, 0.0]], "clip": [-1, 1], "requires": ["m"]}
    config = build(tree(rewards=["mine.py:a", b, "mine.py:m"]))
    for again in (config, build(config.tree())):
        combining = gather(again, Given(rows=ROWS), tmp_path).rubric.combining
        assert combining.weights(5) == {"a": 3.0, "b": 0.5}
        assert combining.terms["a"].requires == ["b"] and combining.terms["a"].clip == (0, 2)
        assert combining.counted({"a": 5.0, "b": 7.0, "m": 1.0}) == {"a": 2.0, "b": 1.0}
        assert combining.counted({"a": 5.0, "b": 7.0, "m": 0.0}) == {"a": 0.0, "b": 0.0}


def test_the_configuration_may_take_a_gate_away(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(GATED)
    with pytest.raises(RewardError, match="reward a requires b, but the rewards are a"):
        gather(build(tree(rewards=["mine.py:a"])), Given(rows=ROWS), tmp_path)
    config = build(tree(rewards=[{"name": "mine.py:a", "requires": []}]))
    combining = gather(config, Given(rows=ROWS), tmp_path).rubric.combining
    assert combining.counted({"a": 5.0}) == {"a": 2.0} and combining.weights(0) == {"a": 3.0}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"requires": ["form"]}, "^reward a requires form, but the rewards are a, b$"),
        ({"clip": [1, 0]}, r"^reward a: clip=\(1.0, 0.0\): clip is the smallest and the largest score"),
        ({"weight": [[9, 1], [3, 0]]}, "^reward a: weight=.* the steps of a weight must increase$"),
    ],
)
def test_terms_that_cannot_be_are_refused_at_the_start(spec, message, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(GATED)
    config = build(tree(rewards=[{"name": "mine.py:a", **spec}, "mine.py:b"]))
    with pytest.raises(RewardError, match=message):
        gather(config, Given(rows=ROWS), tmp_path)


def test_metrics_alone_are_no_reward() -> None:
    @metric
    def only(completion: str) -> float:
        return 1.0

    with pytest.raises(ConfigError, match="every reward is a metric"):
        gather(build(tree()), Given(rewards=[only], rows=ROWS), None)


def test_no_rewards() -> None:
    with pytest.raises(ConfigError, match=r'no rewards: set rewards = \["math_answer"\]'):
        gather(build(tree()), Given(rows=ROWS), None)


def test_no_dataset() -> None:
    with pytest.raises(ConfigError, match=r"no dataset: set data\.dataset to .* or pass dataset=…"):
        gather(build(tree()), Given(rewards=[right]), None)


def test_no_demonstrations() -> None:
    with pytest.raises(ConfigError, match=r"no demonstrations: set warm_start\.dataset"):
        gather(build(tree(warm_start={"steps": 3})), Given(rewards=[right], rows=ROWS), None)


def test_a_reward_that_asks_for_a_missing_column() -> None:
    with pytest.raises(RewardError, match=r"asks_too_much .* asks for solution, .*columns: answer"):
        gather(build(tree()), Given(rewards=[asks_too_much], rows=ROWS), None)


def test_the_prompts_own_column_is_no_column_for_rewards() -> None:
    """Rewards receive it as ``prompt`` under whatever name the dataset has it."""

    def peeks(completion: str, question: str) -> float:
        return 0.0

    rows = [{"question": "1+1", "answer": "2"}]
    with pytest.raises(RewardError, match="asks for question"):
        gather(build(tree()), Given(rewards=[peeks], rows=rows), None)


def test_a_column_missing_only_from_the_held_out_rows() -> None:
    held_out = [{"prompt": "q"}]
    with pytest.raises(RewardError, match="asks for answer"):
        gather(build(tree()), Given(rewards=[right], rows=ROWS, eval_rows=held_out), None)


def test_a_prompt_column_that_is_missing() -> None:
    with pytest.raises(DataError, match=r"data\.prompt_column = 'instruction' is no column of the dataset"):
        gather(build(tree(data={"prompt_column": "instruction"})), Given(rewards=[right], rows=ROWS), None)


def test_held_out_rows_are_taken_from_training() -> None:
    gathered = gather(build(tree(data={"eval_rows": 2})), Given(rewards=[right], rows=ROWS), None)
    train, held_out = ({row["prompt"] for row in rows} for rows in (gathered.rows, gathered.eval_rows))
    assert len(held_out) == 2 and train | held_out == {row["prompt"] for row in ROWS} and not train & held_out


def test_held_out_rows_given_stand_beside_training() -> None:
    held_out = [{"prompt": "other", "answer": "1"}]
    gathered = gather(build(tree()), Given(rewards=[right], rows=ROWS, eval_rows=held_out), None)
    assert list(gathered.rows) == ROWS and list(gathered.eval_rows) == held_out


def test_an_evaluation_split_of_the_same_folder(tmp_path) -> None:
    for name, rows in (("train", ROWS[:4]), ("test", ROWS[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = build(tree(data={"dataset": str(tmp_path), "eval_split": "test"}))
    gathered = gather(config, Given(rewards=[right]), None)
    assert [row["prompt"] for row in gathered.rows] == ["q0", "q1", "q2", "q3"]
    assert [row["prompt"] for row in gathered.eval_rows] == ["q4", "q5"]


def test_a_split_needs_a_named_dataset() -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_split is a split of a named dataset"):
        gather(build(tree(data={"eval_split": "test"})), Given(rewards=[right], rows=ROWS), None)


def test_demonstrations() -> None:
    rows = [{"prompt": "1+1", "completion": "2"}]
    config = build(tree(warm_start={"steps": 3}))
    [(prompt, text)] = gather(config, Given(rewards=[right], rows=ROWS, demonstrations=rows), None).demonstrations
    assert (prompt.source, text) == ("1+1", "2")


@pytest.mark.parametrize(
    ("sections", "given", "message"),
    [
        ({"rewards": [f"{IN_PYTHON}:mine"]}, Given(rows=ROWS), r"the reward mine was given in Python: .*rewards=\["),
        ({"data": IN_PYTHON}, Given(rewards=[right]), r"data\.dataset was given in Python: .*dataset=…"),
        (
            {"data": {"eval_dataset": IN_PYTHON}},
            Given(rewards=[right], rows=ROWS),
            r"data\.eval_dataset was given in Python: .*eval_dataset=…",
        ),
        (
            {"warm_start": {"dataset": IN_PYTHON}},
            Given(rewards=[right], rows=ROWS),
            r"warm_start\.dataset was given in Python: .*demonstrations=…",
        ),
    ],
)
def test_what_was_given_in_python_must_be_given_again(sections, given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        gather(build(tree(**sections)), given, None)


def test_functions_are_written_down_by_name_where_they_can_be_found_again() -> None:
    def local(completion: str) -> float:
        return 0.0

    names = [spec.name for spec in named_rewards([right, local])]
    assert names[0].endswith(":right") and not names[0].startswith(IN_PYTHON)
    assert names[1] == f"{IN_PYTHON}:local"
