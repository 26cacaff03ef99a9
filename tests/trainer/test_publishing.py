"""What the engine reads from the buffer: the adapter in its type, scaling folded in, and never the trained weights."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.rl import algorithms
from posttrain.rl.fingerprint import checksum
from posttrain.rl.sharing import opened
from posttrain.rl.types import Adapter, SharedAdapter
from posttrain.trainer.publishing import AdapterBuffer

from .test_shared_weights import trainer_over
from .tiny import packed, save_tiny, sequences, step_params, wake_adapter
from .tiny_engine import export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("qwen3"))


def read(published):
    """The tensors behind a publication, by PEFT's names: views of the buffer."""
    buffer = opened(published.buffer)
    return {name: buffer[start : start + math.prod(shape)].view(shape) for name, start, shape in published.layout}


def publishing_trainer(folder, dtype="bfloat16", **lora):
    _, shared = export(folder, "dense", dtype=getattr(torch, dtype))
    trainer = trainer_over(folder, shared, dtype, lora=lora)
    wake_adapter(trainer)
    return trainer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("lora", [{}, {"rank": 3, "alpha": 7.0}, {"rank": 5, "rank_stabilized": True}])
def test_the_buffer_holds_the_scaled_adapter_rounded_once(folder, dtype, lora):
    trainer = publishing_trainer(folder, dtype, **lora)
    rank, alpha = lora.get("rank", 16), lora.get("alpha", 32.0)
    scaling = alpha / (math.sqrt(rank) if lora.get("rank_stabilized") else rank)
    published = trainer.publish_adapter()
    assert isinstance(published, SharedAdapter) and published.policy_version == 0
    exported = trainer.export_adapter()
    assert published.config == exported.config
    tensors = read(published)
    assert tensors.keys() == exported.tensors.keys()
    for name, weight in exported.tensors.items():
        assert tensors[name].dtype == getattr(torch, dtype)
        # float32(scaling · B) is within half a unit of float32 of the exact product; the engine's type is coarser
        exact = weight * (torch.tensor(scaling, dtype=torch.float64).float() if "lora_B" in name else 1)
        assert torch.equal(tensors[name], exact.to(tensors[name].dtype)), name
        assert tensors[name].any()


def test_base_plus_the_published_product_is_what_the_trainer_computes(folder):
    trainer = publishing_trainer(folder, "float32", rank=3, alpha=7.0)
    tensors = read(trainer.publish_adapter())
    module = trainer._causal_lm.model.layers[1].mlp.up_proj
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(x)
        ours = module.base_layer(x) + x @ tensors[name.format("A")].T @ tensors[name.format("B")].T
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert (expected - module.base_layer(x)).abs().max() > 1e-2


@pytest.mark.parametrize("alpha", [16.0, 32.0])
def test_the_buffer_never_aliases_the_trained_weights(folder, alpha):
    trainer = publishing_trainer(folder, "float32", alpha=alpha)
    before = trainer.export_adapter().tensors
    published = trainer.publish_adapter()
    storages = {weight.untyped_storage().data_ptr() for weight in trainer._weights.values()}
    assert opened(published.buffer).untyped_storage().data_ptr() not in storages
    for _ in range(10):
        assert trainer.publish_adapter().fingerprint == published.fingerprint
    after = trainer.export_adapter().tensors
    assert all(torch.equal(before[name], after[name]) for name in before)
    opened(published.buffer).fill_(7.0)  # an engine that writes into its side
    assert all(torch.equal(before[name], weight) for name, weight in trainer.export_adapter().tensors.items())


def test_one_buffer_serves_every_version_and_changes_only_when_published(folder):
    trainer = publishing_trainer(folder)
    first = trainer.publish_adapter()
    held = opened(first.buffer).clone()
    trainer.forward_backward([packed(sequences([5, 9]))], algorithms.parse("grpo"))
    trainer.optim_step(step_params(1e-2))
    assert torch.equal(opened(first.buffer), held)
    second = trainer.publish_adapter()
    assert second.buffer is first.buffer and second.layout is first.layout
    assert (first.policy_version, second.policy_version) == (0, 1)
    assert second.fingerprint == checksum(opened(second.buffer)) != first.fingerprint == checksum(held)
    changed = [name for name, tensor in read(second).items() if "lora_B" in name]
    assert changed and not torch.equal(opened(second.buffer), held)


def test_tensors_lie_end_to_end(folder):
    trainer = publishing_trainer(folder, rank=3)
    published = trainer.publish_adapter()
    end = 0
    for name, start, shape in published.layout:
        assert start == end and shape == tuple(trainer._weights[name].shape)
        end += math.prod(shape)
    assert opened(published.buffer).shape == (end,)


def test_a_small_adapter_by_hand():
    weights = {"m.lora_A.weight": torch.ones(1, 3), "m.lora_B.weight": torch.tensor([[3.0], [-1.0]])}
    published = AdapterBuffer(weights, 2.0, torch.bfloat16).publish(4, {"r": 1})
    assert opened(published.buffer).tolist() == [1.0, 1.0, 1.0, 6.0, -2.0]
    assert published.layout == (("m.lora_A.weight", 0, (1, 3)), ("m.lora_B.weight", 3, (2, 1)))
    assert (published.policy_version, published.config) == (4, {"r": 1})


def test_without_shared_weights_the_adapter_goes_through_the_host(folder):
    trainer = trainer_over(folder, None)
    wake_adapter(trainer)
    published, exported = trainer.publish_adapter(), trainer.export_adapter()
    assert isinstance(published, Adapter) and published.config == exported.config
    assert all(torch.equal(published.tensors[name], tensor) for name, tensor in exported.tensors.items())
