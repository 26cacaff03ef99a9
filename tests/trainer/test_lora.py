"""Adapters travel to plain peft and back."""

from __future__ import annotations

import json
from itertools import pairwise

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from posttrain.rl.errors import CheckpointError, EngineError

from .tiny import packed, save_tiny, sequences, trainer_of, wake_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def peft_logprobs(model, batch):
    """Logprobs [T] of the loss tokens of a batch from a peft model's logits, one sequence at a time."""
    found = torch.zeros(len(batch.input_ids), dtype=torch.float64)
    bounds = batch.cu_seqlens.tolist()
    with torch.no_grad():
        for start, stop in pairwise(bounds):
            ids = batch.input_ids[start:stop]
            table = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            found[start + 1 : stop] = table.gather(1, ids[1:, None]).squeeze(1)
    return torch.where(batch.loss_mask, found, 0.0)


@pytest.mark.parametrize(
    "settings", [{}, {"rank_stabilized": True, "rank": 4}, {"target_modules": ["q_proj", "down_proj"]}]
)
def test_checkpoint_loads_in_plain_peft(folder, tmp_path, settings):
    trainer = trainer_of(folder, lora=settings)
    wake_adapter(trainer)
    batch = packed(sequences([9, 14, 6]))
    trainer.save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    unadapted = peft_logprobs(base, batch)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    ours = trainer.score([batch])[0].logprobs
    torch.testing.assert_close(peft_logprobs(loaded, batch), ours, rtol=1e-9, atol=1e-9)
    assert (ours - unadapted).abs().max() > 1e-3
    expected = peft.get_peft_model_state_dict(loaded)
    exported = trainer.export_adapter().tensors
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


def test_peft_checkpoint_loads_here(folder, tmp_path):
    torch.manual_seed(4)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=7, target_modules=["v_proj", "up_proj"],
                               init_lora_weights=False)  # fmt: skip
    theirs = peft.get_peft_model(base, settings)
    theirs.save_pretrained(tmp_path)
    trainer = trainer_of(folder, lora={"rank": 5, "alpha": 7.0, "target_modules": ["v_proj", "up_proj"]})
    trainer.load_weights(tmp_path)
    batch = packed(sequences([9, 14, 6]))
    torch.testing.assert_close(trainer.score([batch])[0].logprobs, peft_logprobs(theirs, batch), rtol=1e-9, atol=1e-9)
    with pytest.raises(CheckpointError, match=r"trainer\.pt: missing"):
        trainer.load(tmp_path)


def test_adapter_config_is_what_peft_writes(folder, tmp_path):
    trainer = trainer_of(folder)
    trainer.save(tmp_path)
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    trainer._peft.save_pretrained(tmp_path / "peft")
    theirs = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert {**theirs, "target_modules": sorted(theirs["target_modules"])} == ours
    assert ours == dict(trainer.export_adapter().config)
    assert (ours["r"], ours["lora_alpha"], ours["peft_type"], ours["lora_dropout"]) == (16, 32.0, "LORA", 0.0)


def test_the_seed_decides_the_adapter_and_leaves_the_random_state(folder):
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    one, two, other = (trainer_of(folder, seed=seed).export_adapter().tensors for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if "lora_A" in name)
    assert all(not one[name].any() for name in one if "lora_B" in name)


def test_the_adapter_of_a_bfloat16_base_is_float32(folder):
    trainer = trainer_of(folder, "bfloat16")
    assert {weight.dtype for weight in trainer._weights.values()} == {torch.float32}
    assert {weight.dtype for weight in trainer.base_weights().values()} == {torch.bfloat16}


def test_all_linear_leaves_the_head_out(folder):
    names = trainer_of(folder).export_adapter().tensors
    modules = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_wrong_targets_are_one_clear_error(folder):
    with pytest.raises(EngineError, match=r"trainer\.lora\.target_modules = \['nothing'\]"):
        trainer_of(folder, lora={"target_modules": ["nothing"]})
    with pytest.raises(EngineError, match="kept frozen"):
        trainer_of(folder, lora={"target_modules": ["q_proj", "lm_head"]})
