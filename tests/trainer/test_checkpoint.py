"""Saving, loading, and continuing exactly where a run stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.rl import algorithms
from posttrain.rl.errors import CheckpointError

from .tiny import packed, save_tiny, sequences, step_params, trainer_of

BATCHES = [packed(sequences([9, 14, 6, 2], seed=seed)) for seed in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("qwen3"))


def train(trainer, batches):
    for batch in batches:
        trainer.forward_backward([batch], algorithms.parse("grpo"))
        trainer.optim_step(step_params(weight_decay=0.01))


SETUPS = {
    "lora": ("float32", {}),
    "lora 8-bit": ("float32", {"optimizer": "adamw_8bit", "lora": {"rank": 128}}),
    "full": ("float32", {"method": "full"}),
    "full bfloat16 with masters": ("bfloat16", {"method": "full"}),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_continuing_is_bit_identical_to_not_having_stopped(folder, tmp_path, setup):
    dtype, settings = SETUPS[setup]
    if "8-bit" in setup:
        pytest.importorskip("bitsandbytes")
    straight = trainer_of(folder, dtype, **settings)
    train(straight, BATCHES[:3])
    straight.save(tmp_path)
    torch.rand(3)
    train(straight, BATCHES[3:])
    resumed = trainer_of(folder, dtype, seed=77, **settings)
    train(resumed, BATCHES[4:])  # must leave no trace
    resumed.load(tmp_path)
    assert resumed.policy_version == 3
    train(resumed, BATCHES[3:])
    one, two = straight.export_adapter(), resumed.export_adapter()
    assert one.policy_version == two.policy_version == 5
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(two.tensors[name], tensor) for name, tensor in one.tensors.items())
    saved = resumed._optimizer.state_dict()["masters"]
    assert bool(saved) == ("masters" in setup)
    for name, master in straight._optimizer.state_dict()["masters"].items():
        assert torch.equal(saved[name], master)


def test_load_undoes_what_came_after_the_save(folder, tmp_path):
    trainer = trainer_of(folder, "float32")
    train(trainer, BATCHES[:1])
    trainer.save(tmp_path)
    expected, random = trainer.export_adapter(), torch.rand(2)
    train(trainer, BATCHES[1:3])
    trainer.load(tmp_path)
    found = trainer.export_adapter()
    assert found.policy_version == 1
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert torch.equal(torch.rand(2), random)


def test_full_checkpoint_loads_in_plain_transformers(folder, tmp_path):
    trainer = trainer_of(folder, "float32", method="full")
    train(trainer, BATCHES[:2])
    trainer.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tensors = trainer.export_adapter().tensors
    assert dict(plain.named_parameters()).keys() == tensors.keys()
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in plain.named_parameters())
    assert "posttrain" not in (tmp_path / "config.json").read_text()
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "config.json", "trainer.pt"}


def test_the_files_of_a_lora_checkpoint(folder, tmp_path):
    trainer_of(folder, "float32").save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "trainer.pt",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"rank": 8}}, "rank 16.*is 8"),
        ({"lora": {"alpha": 8.0}}, "alpha 32.*is 8"),
        ({"lora": {"rank_stabilized": True}}, "rank_stabilized False.*is True"),
        ({"lora": {"target_modules": ["q_proj"]}}, "it has .*which this run does not train"),
        ({"method": "full"}, "method = lora, this run has full"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_difference(folder, tmp_path, settings, message):
    trainer_of(folder, "float32").save(tmp_path)
    other = trainer_of(folder, "float32", **settings)
    before = other.export_adapter().tensors
    with pytest.raises(CheckpointError, match=message):
        other.load(tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.export_adapter().tensors.items())


def test_another_base_model_is_refused(folder, tmp_path):
    trainer_of(folder, "float32").save(tmp_path)
    other = trainer_of(save_tiny(tmp_path / "wider", intermediate_size=56), "float32")
    with pytest.raises(CheckpointError, match=r"has shape \[\d+, 40\], this run's is \[\d+, 56\]|shape \[40, 16\]"):
        other.load(tmp_path)


@pytest.mark.parametrize("broken", ["adapter_model.safetensors", "adapter_config.json", "trainer.pt"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_an_incomplete_checkpoint_is_one_clear_error(folder, tmp_path, broken, how):
    trainer = trainer_of(folder, "float32")
    trainer.save(tmp_path)
    path = tmp_path / broken
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=broken.replace(".", r"\.")):
        trainer.load(tmp_path)


def test_a_missing_tensor_is_named(folder, tmp_path):
    trainer = trainer_of(folder, "float32")
    trainer.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors.pop(gone)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"it lacks {gone}"):
        trainer.load(tmp_path)


def test_objects_in_the_trainer_state_are_never_built(folder, tmp_path):
    trainer = trainer_of(folder, "float32")
    trainer.save(tmp_path)
    torch.save({"format": 1, "method": Path("lora")}, tmp_path / "trainer.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer.load(tmp_path)
