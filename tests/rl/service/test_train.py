"""``rl.train``: keyword arguments in every form, resumed runs, scripts and notebooks. Real runs, a tiny model."""

from __future__ import annotations

import asyncio
import json
import threading
import tomllib
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from posttrain import rl
from posttrain.rl.errors import CheckpointError, ConfigError, RewardError
from posttrain.rl.run_dir import RunDir
from posttrain.rl.service.inputs import IN_PYTHON
from posttrain.rl.service.run import evaluate
from tests.fakes import FakeLearner, FakeSampler

from .tiny_runs import ROWS, reproducible, settings, spread


def train(folder, **changes) -> rl.RunResult:
    return rl.train(**{"dataset": ROWS, "rewards": [spread], "output_dir": str(folder), **settings(**changes)})


def written(result: rl.RunResult) -> dict:
    return tomllib.loads((result.run_dir / "config.toml").read_text())


def test_a_finished_run(tmp_path) -> None:
    result = train(tmp_path, run_name="mine")
    assert result.run_dir == tmp_path / "mine" and result.plot is None
    assert [row["step"] for row in result.metrics] == [1, 2, 3]
    assert result.checkpoint == tmp_path / "mine" / "checkpoints" / "step_000003"
    assert (result.checkpoint / "adapter_model.safetensors").stat().st_size > 0
    assert result.metrics == [json.loads(line) for line in (result.run_dir / "metrics.jsonl").open()]
    assert all(row["reward/spread/std"] > 0 for row in result.metrics)


def test_the_checkpoint_loads_in_peft(tmp_path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = train(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(result.run_dir / "model")
    model = PeftModel.from_pretrained(base, str(result.checkpoint))
    assert any("lora_B" in name and bool(weight.any()) for name, weight in model.named_parameters())


def test_flat_names_and_sections_say_the_same(tmp_path) -> None:
    flat = train(tmp_path / "flat")
    nested = rl.train(
        dataset=ROWS,
        rewards=[spread],
        model=settings()["model"],
        steps=3,
        rollout={"prompts_per_step": 2, "group_size": 4, "max_tokens": 3},
        trainer={"learning_rate": 1e-2, "lora": {"rank": 4}},
        logging={"console": "off", "plot": False},
        output_dir=str(tmp_path / "nested"),
    )
    assert reproducible(nested.metrics) == reproducible(flat.metrics)


def test_files_and_names_say_the_same_as_python_objects(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "own.py").write_text(
        "def spread(completion):\n    return sum((ord(c) - 45) / 3**place for place, c in enumerate(completion, 1))\n"
    )
    given = train(tmp_path / "given")
    named = train(tmp_path / "named", dataset=str(tmp_path / "rows.jsonl"), rewards=[f"{tmp_path}/own.py:spread"])
    assert reproducible(named.metrics) == reproducible(given.metrics)
    assert written(named)["data"]["dataset"] == str(tmp_path / "rows.jsonl")
    assert written(given)["data"]["dataset"] == IN_PYTHON


def test_names_and_functions_mixed(tmp_path) -> None:
    (tmp_path / "own.py").write_text("def long(completion):\n    return float(len(completion))\n")
    result = train(tmp_path, rewards=[f"{tmp_path}/own.py:long", spread])
    assert {"reward/long/mean", "reward/spread/mean"} <= result.metrics[0].keys()


def test_algorithms_by_name_by_table_and_as_objects(tmp_path) -> None:
    from posttrain.rl.algorithms import parse

    table = {"name": "gspo", "clip_high": 0.01}
    by_table = train(tmp_path / "a", algorithm=table)
    by_object = train(tmp_path / "b", algorithm=parse(table))
    assert reproducible(by_table.metrics) == reproducible(by_object.metrics)
    assert written(by_table)["algorithm"]["name"] == written(by_object)["algorithm"]["name"] == "gspo"
    assert written(train(tmp_path / "c", algorithm="cispo"))["algorithm"]["name"] == "cispo"


def test_demonstrations_warm_up(tmp_path) -> None:
    shown = [{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS]
    result = train(tmp_path, demonstrations=shown, warm_start={"steps": 40, "learning_rate": 2e-2})
    assert result.metrics[0]["step"] == 0 and result.metrics[0]["loss/warm_start"] < 2.0
    cold = train(tmp_path / "cold")
    assert result.metrics[1]["policy/entropy"] < cold.metrics[0]["policy/entropy"]


def test_held_out_rows_are_evaluated(tmp_path) -> None:
    result = train(tmp_path, dataset=ROWS[:8], eval_dataset=ROWS[8:], evaluation={"every": 2, "samples": 2})
    assert [row["step"] for row in result.metrics if "eval/pass@2" in row] == [0, 2, 3]
    assert result.metrics[0]["eval/prompts"] == 2


def test_the_schedule_starts_at_its_first_step_and_wastes_none(tmp_path) -> None:
    result = train(tmp_path, steps=5, learning_rate=0.03, warmup_steps=2, schedule="linear")
    rates = [row["optim/learning_rate"] for row in result.metrics]
    assert rates == pytest.approx([0.015, 0.03, 0.03, 0.02, 0.01])


def test_full_fine_tuning(tmp_path) -> None:
    result = train(tmp_path, method="full", learning_rate=1e-3)
    assert (result.checkpoint / "model.safetensors").exists()
    assert all(row["optim/grad_norm"] > 0 for row in result.metrics)


# -- resumed -----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_with_more_steps_equals_one_that_had_them_from_the_start(tmp_path) -> None:
    whole = train(tmp_path / "whole", steps=5)
    short = train(tmp_path / "short", steps=2)
    longer = rl.train(resume=short.run_dir, steps=5, dataset=ROWS, rewards=[spread])
    assert longer.run_dir == short.run_dir
    assert reproducible(longer.metrics) == reproducible(whole.metrics)
    assert written(longer)["steps"] == 5


def test_a_resumed_run_finds_its_files_and_functions_by_name(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "own.py").write_text("def long(completion):\n    return float(len(completion))\n")
    short = train(tmp_path, dataset=str(tmp_path / "rows.jsonl"), rewards=[f"{tmp_path}/own.py:long"], steps=1)
    assert [row["step"] for row in rl.train(resume=str(short.run_dir), steps=2).metrics] == [1, 2]


def test_a_function_of_a_module_is_found_again_but_rows_must_be_given(tmp_path) -> None:
    short = train(tmp_path, steps=1)
    with pytest.raises(ConfigError, match=r"data\.dataset was given in Python: go on with rl\.train\(resume=…"):
        rl.train(resume=short.run_dir, steps=2)
    assert [row["step"] for row in rl.train(resume=short.run_dir, steps=2, dataset=ROWS).metrics] == [1, 2]


def test_a_local_function_must_be_given_again(tmp_path) -> None:
    def local(completion: str) -> float:
        return spread(completion)

    short = train(tmp_path, steps=1, rewards=[local])
    with pytest.raises(ConfigError, match="the reward local was given in Python"):
        rl.train(resume=short.run_dir, steps=2, dataset=ROWS)
    assert len(rl.train(resume=short.run_dir, steps=2, dataset=ROWS, rewards=[local]).metrics) == 2


def test_other_data_is_refused_on_resume(tmp_path) -> None:
    short = train(tmp_path, steps=1)
    other = [{**row, "answer": "7"} for row in ROWS]
    with pytest.raises(rl.PosttrainError, match="the saved position does not fit the data"):
        rl.train(resume=short.run_dir, steps=2, dataset=other, rewards=[spread])
    assert tomllib.loads((short.run_dir / "config.toml").read_text())["steps"] == 1, "a refused change is not kept"


def test_a_change_that_does_not_fit_the_checkpoint_is_refused_and_forgotten(tmp_path) -> None:
    short = train(tmp_path, steps=1)
    with pytest.raises(CheckpointError, match=r"the adapter has r(ank)? 4"):
        rl.train(resume=short.run_dir, steps=2, lora={"rank": 8}, dataset=ROWS, rewards=[spread])
    assert [row["step"] for row in rl.train(resume=short.run_dir, steps=2, dataset=ROWS).metrics] == [1, 2]


def test_no_such_run(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="there is no such run"):
        rl.train(resume=tmp_path / "nothing", dataset=ROWS, rewards=[spread])


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_sise": 4}, "unknown setting group_sise; did you mean group_size"),
        ({"rewards": [3]}, "rewards: give functions or names"),
        ({"rewards": []}, "no rewards"),
        ({"steps": 0}, "steps"),
        ({"algorithm": "grpoo"}, "grpoo"),
        ({"engine": "vllm"}, r"rollout\.engine = \"vllm\" needs vLLM"),
        ({"model": {"random": {"config": {"model_type": "nonesuch"}, "characters": "ab"}}}, "nonesuch"),
    ],
)
def test_refused_without_a_run_folder(tmp_path, monkeypatch, changes, message) -> None:
    import posttrain.rl.service.blueprint as blueprint

    monkeypatch.setattr(blueprint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(rl.PosttrainError, match=message):
        train(tmp_path / "runs", **changes)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_failing_reward_arrives_as_it_is_and_the_run_can_go_on(tmp_path) -> None:
    calls = 0

    def local(completion: str) -> float:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyError("solution")
        return spread(completion)

    with pytest.raises(RewardError, match="reward local raised KeyError on") as caught:
        train(tmp_path, run_name="run", rewards=[local])
    assert isinstance(caught.value.__cause__, KeyError)
    calls = -1000
    resumed = rl.train(resume=tmp_path / "run", dataset=ROWS, rewards=[local])
    assert [row["step"] for row in resumed.metrics] == [1, 2, 3]
    assert [row["reward/mean"] for row in resumed.metrics] == [
        row["reward/mean"] for row in train(tmp_path / "whole").metrics
    ]


def test_a_run_in_use_is_refused(tmp_path) -> None:
    result = train(tmp_path, steps=1)
    with (
        RunDir.open(result.run_dir).lock(),
        pytest.raises(CheckpointError, match="is in use by process"),
    ):
        rl.train(resume=result.run_dir, steps=2, dataset=ROWS, rewards=[spread])


# -- where it is called from -------------------------------------------------------------------------------------------


def test_from_inside_a_running_event_loop_as_in_a_notebook(tmp_path) -> None:
    plain = train(tmp_path / "plain")

    async def cell() -> rl.RunResult:
        return train(tmp_path / "cell")

    assert reproducible(asyncio.run(cell()).metrics) == reproducible(plain.metrics)
    assert threading.active_count() == 1 or not any(t.name == "posttrain" for t in threading.enumerate())


def test_errors_leave_a_notebook_as_they_are(tmp_path) -> None:
    def broken(completion: str) -> float:
        return float("nan")

    async def cell() -> None:
        train(tmp_path, rewards=[broken])

    with pytest.raises(RewardError, match="broken returned nan"):
        asyncio.run(cell())


def test_from_a_thread_that_gets_no_signals(tmp_path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert [row["step"] for row in results[0].metrics] == [1, 2, 3]


# -- evaluate ----------------------------------------------------------------------------------------------------------


def test_evaluating_a_checkpoint_repeats_the_runs_own_figures(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    result = train(
        tmp_path, dataset=str(tmp_path / "rows.jsonl"), eval_rows=4, evaluation={"every": 3, "samples": 3}, steps=3
    )
    stored = RunDir.open(result.run_dir)
    figures = evaluate(rl.Config(**stored.config()), checkpoint=result.checkpoint, base=stored.base())
    expected = {key: value for key, value in result.metrics[-1].items() if key.startswith("eval/")}
    assert figures == expected and figures["eval/prompts"] == 4


def test_evaluating_wakes_an_engine_that_was_placed_asleep(tmp_path, monkeypatch) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    result = train(tmp_path, dataset=str(tmp_path / "rows.jsonl"), eval_rows=4, steps=1)
    stored, sampler, learner = RunDir.open(result.run_dir), FakeSampler(), FakeLearner()
    sampler.awake = False
    asyncio.run(learner.save(result.checkpoint))

    @asynccontextmanager
    async def place(config, source, run):
        yield SimpleNamespace(sampler=sampler, learner=learner)

    monkeypatch.setattr("posttrain.rl.service.run.place", place)
    figures = evaluate(rl.Config(**stored.config()), checkpoint=result.checkpoint, base=stored.base())
    assert figures["eval/prompts"] == 4
    assert [event[0] for event in sampler.events] == ["load", "wake", "sample"]


def test_evaluating_needs_held_out_rows(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    result = train(tmp_path, dataset=str(tmp_path / "rows.jsonl"), steps=1)
    stored = RunDir.open(result.run_dir)
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        evaluate(rl.Config(**stored.config()), checkpoint=result.checkpoint, base=stored.base())
