"""The configuration tree: what goes in comes out, and every mistake has its line."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import BaseModel, ValidationError

from posttrain.rl import config as configuration
from posttrain.rl import sections
from posttrain.rl.algorithms import ALGORITHMS, parse
from posttrain.rl.config import Config, ModelConfig, build, from_settings, load
from posttrain.rl.errors import ConfigError

SECTIONS = [Config, *(kind for kind in vars(sections).values() if isinstance(kind, type) and kind is not BaseModel)]
SECTIONS = [kind for kind in SECTIONS if issubclass(kind, BaseModel) and kind.model_fields]


def complaint(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(tree)
    return str(caught.value)


def with_(**changes: Any) -> dict[str, Any]:
    return {"model": "owner/model", **changes}


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_survives_toml(name: str) -> None:
    config = build(with_(algorithm=name, rewards=["a", {"name": "b", "weight": 0.5}]))
    again = build(tomllib.loads(tomli_w.dumps(config.tree())))
    assert again == config
    assert type(again.algorithm) is ALGORITHMS[name]
    assert again.tree() == config.tree()


def test_values_other_than_the_defaults_survive_toml() -> None:
    tree = {
        "model": {"random": {"config": {"model_type": "qwen3", "rope": {"theta": 1e6}}, "characters": 'a"\\é\n'}},
        "data": {"dataset": "f.py:rows", "worked_turns": [{"role": "user", "content": "x"}], "chat": False},
        "rewards": [{"name": "r.py:score", "weight": -0.5}],
        "algorithm": {"name": "dapo", "clip_high": 0.3},
        "rollout": {"stop_token_ids": [1, 2], "top_k": 0, "temperature": 0.7, "kv_cache_gib": 8.25},
        "trainer": {"betas": [0.5, 0.75], "max_grad_norm": math.inf, "lora": {"target_modules": ["q_proj"]}},
        "warm_start": {"dataset": "d.jsonl", "steps": 3},
        "seed": -3,
        "run_name": "x",
        "gpus": 2,
        "gpu_memory_gib": 40.5,
        "max_restarts": 0,
    }
    config = build(tree)
    again = build(tomllib.loads(tomli_w.dumps(config.tree())))
    assert again == config
    assert (again.trainer.max_grad_norm, again.trainer.betas) == (math.inf, (0.5, 0.75))
    assert again.algorithm.clip_high == 0.3  # type: ignore[attr-defined]
    assert again.model.random is not None and again.model.random.characters == 'a"\\é\n'


@pytest.mark.parametrize(
    "correction",
    [{"name": "tis", "cap": 3.5}, {"name": "mis", "low": 0.25, "high": 1.5}, {"name": "icepop", "high": 7.0}],
)
def test_corrections_survive_toml_with_their_own_fields(correction: dict[str, Any]) -> None:
    config = build(with_(algorithm={"name": "gspo", "correction": correction}))
    again = build(tomllib.loads(tomli_w.dumps(config.tree())))
    assert again == config
    written = again.tree()["algorithm"]["correction"]
    assert correction.items() <= written.items()


def test_the_tree_holds_every_field_that_is_set_and_no_null() -> None:
    tree = build(with_()).tree()
    assert tree["model"] == {
        "name": "owner/model",
        "trust_remote_code": False,
        "dtype": "auto",
        "quantization": "none",
    }
    assert tree["algorithm"]["name"] == "grpo"
    assert "warm_start" not in tree and "run_name" not in tree
    assert tree["trainer"]["lora"]["rank"] == 16


def test_the_configuration_is_frozen() -> None:
    config = build(with_())
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.trainer.lora.rank = 3  # type: ignore[misc]


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_field_is_documented(kind: type[BaseModel]) -> None:
    assert [name for name, field in kind.model_fields.items() if not (field.description or "").strip()] == []


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_field_of_an_algorithm_is_documented_where_it_was_introduced(name: str) -> None:
    lineage = [kind for kind in ALGORITHMS[name].__mro__ if issubclass(kind, BaseModel)]
    for field in ALGORITHMS[name].model_fields:
        infos = [kind.model_fields[field] for kind in lineage if field in kind.model_fields]
        assert any(info.description for info in infos), field


# -- shorthands and overrides -----------------------------------------------------------------------------------------


def test_bare_strings_stand_for_sections() -> None:
    config = build({"model": "m", "data": "d", "rewards": ["r"], "algorithm": "gspo"})
    assert (config.model.name, config.data.dataset, config.rewards[0].name) == ("m", "d", "r")
    assert (config.rewards[0].weight, config.algorithm.name) == (None, "gspo")


def test_an_algorithm_instance_and_a_table_without_a_name() -> None:
    dapo = parse("dapo")
    assert build(with_(algorithm=dapo)).algorithm is dapo
    config = build(with_(algorithm={"clip_low": 0.125}))
    assert (config.algorithm.name, config.algorithm.clip_low) == ("grpo", 0.125)  # type: ignore[attr-defined]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.toml"
    path.write_text('model = "m"\ndata = "d"\nalgorithm = "gspo"\nrewards = ["a"]\n[trainer]\nbetas = [0.1, 0.2]\n')
    return path


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("steps=7", "steps", 7),
        (" steps = 7 ", "steps", 7),
        ("trainer.learning_rate=1e-5", "trainer.learning_rate", 1e-5),
        ("trainer.lora.rank=4", "trainer.lora.rank", 4),
        ("trainer.max_grad_norm=inf", "trainer.max_grad_norm", math.inf),
        ("trainer.betas=[0.5, 0.6]", "trainer.betas", (0.5, 0.6)),
        ("model=other/name", "model.name", "other/name"),
        ('model="other/name"', "model.name", "other/name"),
        ("model.dtype=float64", "model.dtype", "float64"),
        ("data.split=test", "data.split", "test"),
        ("algorithm.clip_low=0.01", "algorithm.clip_low", 0.01),
        ("algorithm=dapo", "algorithm.name", "dapo"),
        ("data.chat=false", "data.chat", False),
        ("data.dataset=file.py:rows=3", "data.dataset", "file.py:rows=3"),
        ("warm_start.steps=5", "warm_start.steps", 5),
        ("run_name=2024-01-01", "run_name", "2024-01-01"),
    ],
)
def test_overrides_reach_their_field(file: Path, override: str, path: str, value: object) -> None:
    found: Any = load(file, [override])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_overrides_keep_what_the_shorthand_said_and_the_last_one_wins(file: Path) -> None:
    config = load(file, ["model.dtype=float32", "data.split=test", "algorithm.clip_low=0.01", "steps=1", "steps=2"])
    assert (config.model.name, config.data.dataset, config.algorithm.name, config.steps) == ("m", "d", "gspo", 2)


@pytest.mark.parametrize("override", ["steps", "=3", "  =3", ""])
def test_an_override_without_key_or_value(file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="write key=value"):
        load(file, [override])


def test_an_override_below_a_plain_value(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.betas is not a table"):
        load(file, ["trainer.betas.first=1"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        load(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.toml: not valid TOML"):
        load(tmp_path / "binary.toml")


# -- flat settings ----------------------------------------------------------------------------------------------------


def test_flat_settings_find_their_section() -> None:
    config = from_settings(
        model="m",
        dataset="d",
        group_size=4,
        learning_rate=1e-4,
        rewards=["r"],
        algorithm="gspo",
        steps=3,
        wandb_project="p",
    )
    assert (config.model.name, config.data.dataset, config.rollout.group_size) == ("m", "d", 4)
    assert (config.trainer.learning_rate, config.steps, config.logging.wandb_project) == (1e-4, 3, "p")


def test_flat_settings_join_the_section_they_belong_to() -> None:
    config = from_settings(
        model=ModelConfig(name="m", dtype="float64"), revision="r", rollout={"top_k": 5}, group_size=4
    )
    assert (config.model.name, config.model.dtype, config.model.revision) == ("m", "float64", "r")
    assert (config.rollout.top_k, config.rollout.group_size) == (5, 4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"grup_size": 4}, "unknown setting grup_size; did you mean group_size"),
        ({"learning_rates": 4}, "did you mean learning_rate"),
    ],
)
def test_unknown_flat_settings_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_settings(model="m", **setting)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "model: missing; it has no default"),
        (with_(stps=1), "stps: unknown key; did you mean steps?"),
        (with_(rollout={"grop_size": 1}), "rollout.grop_size: unknown key; did you mean group_size?"),
        (with_(trainer={"lora": {"rnk": 1}}), "trainer.lora.rnk: unknown key; did you mean rank?"),
        (with_(rewards=["a", {"name": "b", "wieght": 1}]), "rewards.1.wieght: unknown key; did you mean weight?"),
        (with_(warm_start={"stps": 1}), "warm_start.stps: unknown key; did you mean steps?"),
        ({"model": {"random": {"config": {}, "x": 1}}}, "model.random.x: unknown key; known: characters, config, seed"),
        ({"model": {}}, "model: give exactly one of model.name (hub name or folder) and model.random"),
        ({"model": ""}, "model: give exactly one of model.name (hub name or folder) and model.random"),
        (
            {"model": {"name": "m", "random": {"config": {}}}},
            "model: give exactly one of model.name (hub name or folder) and model.random",
        ),
        ({"model": {"random": {}}}, "model.random.config: missing; it has no default"),
        ({"model": {"random": {"config": {"a": None}}}}, "model.random.config: a: TOML has no null, leave the key out"),
        (with_(steps=0), "steps: Input should be greater than 0 (got 0)"),
        (
            with_(trainer={"learning_rate": math.nan}),
            "trainer.learning_rate: Input should be a finite number (got nan)",
        ),
        (
            with_(trainer={"learning_rate": math.inf}),
            "trainer.learning_rate: Input should be a finite number (got inf)",
        ),
        (with_(trainer={"betas": [0.9, 1.0]}), "trainer.betas.1: Input should be less than 1 (got 1.0)"),
        (with_(trainer={"betas": [0.9]}), "trainer.betas.1: missing; it has no default"),
        (with_(rollout={"top_p": 0}), "rollout.top_p: Input should be greater than 0 (got 0)"),
        (
            with_(trainer={"lora": {"target_modules": 3}}),
            "trainer.lora.target_modules: "
            "Input should be 'all-linear' (got 3); or Input should be a valid list (got 3)",
        ),
        (
            with_(rollout={"engine": "tgi"}),
            "rollout.engine: Input should be 'auto', 'transformers' or 'vllm' (got 'tgi')",
        ),
        (
            with_(algorithm={"name": "grpo", "clip_lo": 1}),
            "algorithm.clip_lo: unknown key; did you mean clip_low or clip_high?",
        ),
        (
            with_(algorithm=3),
            'algorithm: give a name, as "gspo", or a table with name and that algorithm\'s fields (got 3)',
        ),
    ],
)
def test_each_mistake_has_its_line(tree: dict[str, Any], message: str) -> None:
    assert complaint(tree) == message


def test_an_unknown_algorithm_lists_the_known_ones() -> None:
    message = complaint(with_(algorithm="gprs"))
    assert message.startswith("algorithm: unknown algorithm 'gprs'; known: ") and "\n" not in message
    assert all(name in message for name in ALGORITHMS)


def test_several_mistakes_come_together_a_line_each() -> None:
    lines = complaint(
        with_(steps=0, rollout={"max_tokens": 0, "x": 1}, algorithm={"clip_low": -1, "y": 1})
    ).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == [
        "algorithm.clip_low",
        "algorithm.y",
        "rollout.max_tokens",
        "rollout.x",
        "steps",
    ]


# -- combinations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_truncated_sampling_excludes_corrections(truncation: dict[str, float]) -> None:
    plain = build(with_(rollout=truncation)).algorithm
    assert not plain.needs_rollout_logprobs
    corrected = build(with_(algorithm={"correction": {"name": "tis"}})).algorithm
    assert "switch the truncation off or remove the correction" in complaint(
        with_(rollout=truncation, algorithm=corrected)
    )
    assert corrected.needs_rollout_logprobs


@pytest.mark.parametrize(
    ("change", "remedy", "message"),
    [
        (
            {"trainer": {"method": "full"}, "algorithm": {"kl_coef": 0.1}},
            {"algorithm": {"kl_coef": 0.0}},
            "full fine-tuning overwrites",
        ),
        (
            {"warm_start": {"steps": 1}, "algorithm": {"kl_coef": 0.1}},
            {"algorithm": {"kl_coef": 0.0}},
            "use kl_coef = 0 with warm_start",
        ),
        (
            {"rollout": {"prompts_per_step": 6}, "trainer": {"updates_per_batch": 4}},
            {"trainer": {"updates_per_batch": 3}},
            r"prompts_per_step \(6\) must be a multiple of trainer.updates_per_batch \(4\)",
        ),
        ({"rollout": {"group_size": 1}}, {"algorithm": "reinforce_pp"}, "group_size must be at least 2"),
        ({"evaluation": {"every": 5}}, {"data": {"eval_rows": 3}}, "needs held-out rows"),
        ({"evaluation": {"every": 5}}, {"data": {"eval_split": "test"}}, "needs held-out rows"),
        ({"evaluation": {"every": 5}}, {"data": {"eval_dataset": "d"}}, "needs held-out rows"),
        (
            {"evaluation": {"temperature": 0.0, "samples": 4}},
            {"evaluation": {"temperature": 0.0, "samples": 1}},
            "set evaluation.samples = 1",
        ),
        ({"gpus": 2, "placement": "embedded"}, {"placement": "ray"}, r"gpus = 2 needs a process for each"),
        ({"gpus": 2, "trainer": {"device": "cpu"}}, {"trainer": {"device": "cuda"}}, "contradict each other"),
        (
            {"rollout": {"kv_cache_gib": 8.5}, "gpu_memory_gib": 8.5},
            {"gpu_memory_gib": 9.0},
            r"kv_cache_gib \(8\.5\) leaves nothing of gpu_memory_gib \(8\.5\)",
        ),
        (
            {"rollout": {"kv_cache_gib": 2, "engine": "transformers"}},
            {"rollout": {"kv_cache_gib": 2, "engine": "vllm"}},
            r"rollout\.kv_cache_gib is vLLM's",
        ),
        (
            {"rollout": {"lora_backend": "slots"}, "trainer": {"lora": {"rank": 513}}},
            {"rollout": {"lora_backend": "dense"}},
            r"goes up to trainer\.lora\.rank = 512 \(got 513\)",
        ),
        (
            {"model": {"name": "m", "quantization": "nf4"}, "trainer": {"method": "full"}},
            {"trainer": {"method": "lora"}},
            r'model\.quantization = "nf4" keeps the base frozen',
        ),
        (
            {"rollout": {"max_model_len": 2559}},
            {"rollout": {"max_model_len": 2560}},
            r"max_model_len \(2559\) is less than data.max_prompt_tokens \(2048\) \+ rollout.max_tokens \(512\)",
        ),
    ],
)
def test_impossible_combinations_are_refused_and_their_remedy_works(
    change: dict[str, Any], remedy: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(with_(**change))
    build(with_(**{**change, **remedy}))


def test_the_longest_sequence_follows_from_its_parts() -> None:
    assert build(with_(data={"max_prompt_tokens": 10}, rollout={"max_tokens": 5})).max_model_len == 15
    assert build(with_(rollout={"max_model_len": 4000})).max_model_len == 4000


def test_everything_is_importable_from_one_place() -> None:
    for name in configuration.__all__:
        assert getattr(configuration, name) is not None
