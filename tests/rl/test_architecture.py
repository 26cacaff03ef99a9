"""Counts on a model without storage against models that are really built."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.rl.architecture import lora_parameters, meta_model
from posttrain.rl.config import build
from posttrain.rl.errors import ConfigError
from tests.rl.architectures import SMALL, configured


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_counts_equal_those_of_the_model_and_of_peft(kind: str, tied: bool, targets: str) -> None:
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = {**SMALL, "model_type": kind, "tie_word_embeddings": tied}
    if kind == "gpt2":
        small = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1}
        architecture = {"model_type": "gpt2", "tie_word_embeddings": tied, **small}
    modules = "all-linear" if targets == "all-linear" else (["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"])
    config = configured(architecture, trainer={"lora": {"rank": 4, "target_modules": modules}})
    real = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    on_meta = meta_model(config.model)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert sum(p.numel() for p in on_meta.parameters()) == sum(p.numel() for p in real.parameters())
    adapted = peft.get_peft_model(real, peft.LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
    assert lora_parameters(on_meta, config.trainer.lora) == adapted.get_nb_trainable_parameters()[0]


def test_the_vocabulary_of_a_random_model_follows_its_characters() -> None:
    architecture = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    config = build({"model": {"random": {"config": architecture, "characters": "0123456789+="}}})
    assert meta_model(config.model).config.vocab_size == 12 + 2  # an end and a padding token


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no folder ./nowhere"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("a/b/c", "there is no folder a/b/c"),
        ("{tmp}", "has no config.json"),
    ],
)
def test_unknown_models_are_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        meta_model(build({"model": name.format(tmp=tmp_path)}).model)


def test_a_hub_name_that_nobody_has(monkeypatch) -> None:
    import transformers

    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect\nlong advice")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ConfigError, match=r"owner/model is neither a local folder nor a model on the hub: We couldn't"):
        meta_model(build({"model": "owner/model"}).model)


def test_an_architecture_nobody_knows() -> None:
    with pytest.raises(ConfigError, match=r"^model\.random\.config: "):
        meta_model(configured({"model_type": "nonsense"}).model)
    with pytest.raises(ConfigError, match="cannot be built as a causal LM"):
        meta_model(configured({"model_type": "t5"}).model)


def test_target_modules_that_name_no_layer() -> None:
    config = configured(SMALL, trainer={"lora": {"target_modules": ["qproj"]}})
    with pytest.raises(ConfigError, match=r"\['qproj'\] names no layer; it has: down_proj, gate_proj"):
        lora_parameters(meta_model(config.model), config.trainer.lora)
