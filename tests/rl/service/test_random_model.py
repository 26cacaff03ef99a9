"""Random models and their character tokenizer: ordinary checkpoints, the same every time, never half there."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.rl.config import ModelConfig
from posttrain.rl.errors import ConfigError
from posttrain.rl.service import random_model
from posttrain.rl.service.random_model import character_tokenizer, materialize

ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


def model(seed: int = 0, characters: str | None = "ab>", tokenizer: str | None = None, **changes) -> ModelConfig:
    random = {"config": {**ARCHITECTURE, **changes}, "seed": seed}
    if characters is not None:
        random["characters"] = characters
    return ModelConfig(random=random, tokenizer=tokenizer)


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_named_model_is_its_name(tmp_path) -> None:
    assert materialize(ModelConfig(name="owner/model"), tmp_path / "model") == "owner/model"
    assert not (tmp_path / "model").exists()


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(tmp_path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    folders = [materialize(model(seed), tmp_path / name) for seed, name in ((0, "a"), (0, "b"), (1, "c"))]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (weights(folder) for folder in folders)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_loads_as_an_ordinary_checkpoint(tmp_path) -> None:
    folder = materialize(model(), tmp_path / "model")
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert loaded.config.vocab_size == len(tokenizer) == 5
    assert (loaded.config.eos_token_id, loaded.config.pad_token_id, loaded.config.bos_token_id) == (1, 0, None)
    assert loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    ids = tokenizer("ba>", add_special_tokens=False)["input_ids"]
    assert ids == [3, 2, 4]
    assert loaded(torch.tensor([ids])).logits.shape == (1, 3, 5)


@pytest.mark.parametrize("text", ["", "0123", "3>456", "9 9\n9", "äß🙂"])
def test_one_token_a_character_and_back(text: str) -> None:
    tokenizer = character_tokenizer("0123456789> \näß🙂")
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text), "no BOS, no EOS"
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    ended = [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ended, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_characters_named_twice_have_one_token() -> None:
    assert len(character_tokenizer("abab")) == 4


def test_another_models_tokenizer(tmp_path) -> None:
    character_tokenizer("xyz").save_pretrained(tmp_path / "tokenizer")
    folder = materialize(model(characters=None, tokenizer=str(tmp_path / "tokenizer")), tmp_path / "model")
    assert AutoTokenizer.from_pretrained(folder)("zx")["input_ids"] == [4, 2]
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 5


def test_an_existing_model_is_kept(tmp_path) -> None:
    materialize(model(0), tmp_path / "model")
    before = weights(tmp_path / "model")
    materialize(model(1), tmp_path / "model")
    after = weights(tmp_path / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_write_that_was_cut_short_is_done_again(tmp_path, monkeypatch) -> None:
    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            materialize(model(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (tmp_path / f"{random_model.PARTIAL}model" / "stale.txt").write_text("left behind")
    materialize(model(), tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names and "stale.txt" not in names
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (model(characters=None), r"model\.random needs model\.random\.characters or model\.tokenizer"),
        (model(model_type="no_such_architecture"), r"model\.random\.config: .*no_such_architecture"),
    ],
)
def test_what_cannot_be_built(tmp_path, config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        materialize(config, tmp_path / "model")
    assert not (tmp_path / "model").exists()
