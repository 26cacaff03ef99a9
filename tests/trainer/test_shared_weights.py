"""A trainer over another's weights: the same numbers as one with its own, in memory that it did not allocate."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from posttrain.rl import algorithms
from posttrain.rl.config import ModelConfig, TrainerConfig
from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import checksum
from posttrain.rl.sharing import share
from posttrain.rl.types import SharedWeight
from posttrain.trainer import shared_weights
from posttrain.trainer.quantized import QuantizedLinear
from posttrain.trainer.trainer import Trainer

from .tiny import FAMILIES, gradients, packed, save_tiny, sequences, step_params, wake_adapter
from .tiny_engine import export

LENGTHS = [3, 9, 2, 14, 6, 1, 11]
SIZES = {"hidden_size": 64, "intermediate_size": 192}
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama", **SIZES)


def trainer_over(folder, shared, dtype="float32", quantization="none", **settings):
    model = ModelConfig(name=str(folder), dtype=dtype, quantization=quantization)
    return Trainer(folder, model, TrainerConfig(device="cpu", **settings), seed=0, shared=shared)


def numbers(trainer):
    """Logprobs of a pack, and the gradient of every adapter weight."""
    wake_adapter(trainer)
    batch = packed(sequences(LENGTHS))
    logprobs = trainer.score([batch])[0].logprobs
    trainer.forward_backward([batch], algorithms.parse("grpo"))
    return {"logprobs": logprobs, **gradients(trainer)}


def assert_same(ours, theirs, rtol=0.0, atol=0.0):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert max(tensor.abs().max() for name, tensor in theirs.items() if "lora" in name) > 1e-3


def dense_shares(trainer):
    """What an engine with transformers' own layout would export."""
    return {
        name: SharedWeight("dense", {"weight": share(weight)}, tuple(weight.shape), {"weight": checksum(weight)}, name)
        for name, weight in trainer.base_weights().items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_computes_as_if_it_had_loaded_its_weights(tmp_path, family, dtype):
    folder = save_tiny(tmp_path, family)
    private = trainer_over(folder, None, dtype)
    trainer = trainer_over(folder, dense_shares(private), dtype)
    assert trainer.checksum() == private.checksum()
    assert trainer.export_adapter().config == private.export_adapter().config
    assert_same(numbers(trainer), numbers(private))


@pytest.mark.parametrize("scheme", ["dense", "nf4", "fp8"])
def test_row_slices_of_fused_weights_give_the_numbers_of_a_private_copy(folder, scheme):
    _, shared = export(folder, scheme)
    private = trainer_over(folder, None, quantization="none" if scheme == "dense" else scheme)
    # the fused fp8 weights are stored transposed: another product of the same numbers
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if scheme == "fp8" else {}
    assert_same(numbers(trainer_over(folder, shared)), numbers(private), **tolerance)


@pytest.mark.parametrize("scheme", ["fp8", "fp8-row", "fp8-block"])
def test_every_kind_of_fp8_scale_equals_a_dense_model_of_the_products(folder, scheme):
    held, shared = export(folder, scheme)
    dense = trainer_over(folder, None, "float64")
    with torch.no_grad():
        for name, tensors in held.items():
            weight, scale = tensors["weight"].double(), tensors.get("scale")
            if scheme == "fp8-block" and scale is not None:
                scale = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
            dense.base_weights()[name].copy_(weight if scale is None else weight * scale.double())
    assert_same(numbers(trainer_over(folder, shared)),
                {name: tensor.float() for name, tensor in numbers(dense).items()}, rtol=1e-3, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("scheme,parts", [("dense", 1), ("nf4", 3), ("fp8-row", 2)])
def test_every_tensor_is_the_engines_own_memory(folder, scheme, parts):
    held, shared = export(folder, scheme)
    trainer = trainer_over(folder, shared)
    report = {entry.name: entry for entry in trainer.storage_report()}
    expected = {name if part == "weight" else f"{name}.{part}": tensor
                for name, tensors in held.items() for part, tensor in tensors.items()}  # fmt: skip
    assert report.keys() == expected.keys() and len(report) == 14 * parts + 15
    for name, tensor in expected.items():
        assert report[name].shared and report[name].data_ptr == tensor.data_ptr()
        assert report[name].bytes == tensor.numel() * tensor.element_size()
    before = trainer.score([packed(sequences(LENGTHS))])[0].logprobs
    held[UP]["weight"].view(torch.uint8).bitwise_xor_(1)
    assert not torch.equal(trainer.score([packed(sequences(LENGTHS))])[0].logprobs, before)


def test_a_tied_head_stays_the_embedding(tmp_path):
    folder = save_tiny(tmp_path, "qwen3", **SIZES)
    held, shared = export(folder, "nf4")
    assert "lm_head.weight" not in shared
    trainer = trainer_over(folder, shared)
    assert trainer._model.head.weight.data_ptr() == held[EMBEDDING]["weight"].data_ptr()
    assert_same(numbers(trainer), numbers(trainer_over(folder, None, quantization="nf4")))


def test_a_second_trainer_maps_the_same_weights_when_the_first_is_gone(folder):
    _, shared = export(folder, "nf4")
    first = trainer_over(folder, shared)
    expected, checksum_of_base = numbers(first), first.checksum()
    first.close()
    second = trainer_over(folder, shared)
    assert second.checksum() == checksum_of_base
    assert_same(numbers(second), expected)


def test_training_leaves_the_shared_weights_alone(folder):
    _, shared = export(folder, "nf4")
    trainer = trainer_over(folder, shared)
    before = trainer.checksum()
    trainer.forward_backward([packed(sequences(LENGTHS))], algorithms.parse("grpo"))
    trainer.optim_step(step_params())
    assert trainer.checksum() == before
    assert {entry.shared for entry in trainer.storage_report()} == {True}


def test_a_copied_tensor_is_noticed(folder, monkeypatch):
    _, shared = export(folder, "dense")
    place = shared_weights._place
    monkeypatch.setattr(
        shared_weights, "_place", lambda model, name, value: place(model, name, value.clone() if name == UP else value)
    )
    with pytest.raises(AssertionError, match=f"{UP} was copied"):
        trainer_over(folder, shared)


def changed(shared, name, **fields):
    return {**shared, name: replace(shared[name], **fields)}


def tensor_in(shared, name, part, tensor):
    """``shared`` with one tensor replaced and its checksum put right."""
    weight = shared[name]
    return changed(
        shared,
        name,
        tensors={**weight.tensors, part: share(tensor)},
        checksums={**weight.checksums, part: checksum(tensor)},
    )


def held_tensor(shared, name, part):
    return shared[name].tensors[part].handle


BROKEN = {
    "missing": ("dense", lambda s: {k: v for k, v in s.items() if k != UP}, rf"does not share {UP} \(1 in all\)"),
    "unknown": ("dense", lambda s: {**s, "model.extra": s[UP]}, r"shares model\.extra .*which the model has not"),
    "shape": ("dense", lambda s: changed(s, UP, shape=(192, 32)), rf"{UP}: .*shape \[192, 32\].*\[192, 64\]"),
    "rows": (
        "dense",
        lambda s: tensor_in(s, UP, "weight", held_tensor(s, UP, "weight")[:7]),
        rf"{UP}: .*comes as \[7, 64\] for a shape of \[192, 64\]",
    ),
    "type": (
        "dense",
        lambda s: tensor_in(s, UP, "weight", held_tensor(s, UP, "weight").half()),
        rf"{UP}: .*float16, the trainer computes in torch\.float32: set model\.dtype",
    ),
    "bits": (
        "dense",
        lambda s: changed(s, UP, checksums={"weight": "0" * 32}),
        rf"{UP}: .*\(tiny\.{UP}\) reads otherwise here than in the engine",
    ),
    "state": (
        "nf4",
        lambda s: changed(s, UP, checksums={**s[UP].checksums, "absmax": "0" * 32}),
        rf"{UP}: .*reads otherwise here than in the engine \(absmax",
    ),
    "parts": (
        "nf4",
        lambda s: changed(s, UP, tensors={"weight": s[UP].tensors["weight"]}),
        f"{UP}: .*nf4 but comes as",
    ),
    "blocks": (
        "nf4",
        lambda s: tensor_in(s, UP, "absmax", held_tensor(s, UP, "absmax")[:5]),
        rf"{UP}: .*absmax': \(\[5\].*in blocks of 64",
    ),
    "code": (
        "nf4",
        lambda s: tensor_in(s, UP, "code", held_tensor(s, UP, "code").flip(0)),
        rf"{UP}: .*another code book",
    ),
    "scale": (
        "fp8",
        lambda s: tensor_in(s, UP, "scale", torch.ones(5)),
        rf"{UP}: .*scales \[5\] torch\.float32, which is not fp8 for \[192, 64\]",
    ),
    "not linear": (
        "nf4",
        lambda s: changed(s, EMBEDDING, scheme="nf4", tensors=s[UP].tensors, checksums=s[UP].checksums, block_size=24),
        rf"{EMBEDDING}: ",
    ),
    "repacked": (
        "dense",
        lambda s: changed(s, UP, tensors={}, checksums={}, repacked="Marlin tiles"),
        rf"{UP}: .*cannot be shared: Marlin tiles\. Set trainer\.copy_repacked_weights = true",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named(folder, case):
    scheme, breaking, message = BROKEN[case]
    _, shared = export(folder, scheme)
    with pytest.raises(EngineError, match=message):
        trainer_over(folder, breaking(shared))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("scheme", ["dense", "nf4", "fp8"])
def test_a_private_copy_of_a_repacked_weight_is_made_on_request(folder, tmp_path, caplog, scheme, sharded):
    from transformers import AutoModelForCausalLM

    source = folder
    if sharded:
        source = tmp_path
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(source, max_shard_size="50KB")
        assert (source / "model.safetensors.index.json").is_file()
    _, shared = export(source, scheme)
    for name in (UP, DOWN):
        shared = changed(shared, name, tensors={}, checksums={}, repacked="Marlin tiles")
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        trainer = trainer_over(source, shared, copy_repacked_weights=True)
    assert f"{UP}: private copy" in caplog.text and "Marlin tiles" in caplog.text
    private = {entry.name.removesuffix(".absmax").removesuffix(".code").removesuffix(".scale")
               for entry in trainer.storage_report() if not entry.shared}  # fmt: skip
    assert private == {UP, DOWN}
    assert isinstance(trainer.base_weights().get(UP.removesuffix(".weight")), QuantizedLinear) == (scheme != "dense")
    expected = numbers(trainer_over(source, None, quantization="none" if scheme == "dense" else scheme))
    assert_same(numbers(trainer), expected, **({"rtol": 1e-4, "atol": 1e-6} if scheme == "fp8" else {}))


def test_a_private_copy_needs_the_tensor_in_the_checkpoint(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    _, shared = export(folder, "dense")
    shared = changed(shared, UP, tensors={}, checksums={}, repacked="Marlin tiles")
    tensors = load_file(folder / "model.safetensors")
    del tensors[UP]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(EngineError, match=f"{UP}: .*holds no plain tensor of that name"):
        trainer_over(tmp_path, shared, copy_repacked_weights=True)


def test_full_fine_tuning_of_shared_weights_is_refused(folder):
    with pytest.raises(EngineError, match=r'cannot train weights shared with the engine.*trainer\.method = "lora"'):
        trainer_over(folder, {}, method="full")


def test_a_source_without_a_model_is_one_clear_error(tmp_path):
    with pytest.raises(EngineError, match="cannot build"):
        trainer_over(tmp_path, {})
