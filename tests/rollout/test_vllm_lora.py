"""One adapter beside vLLM's layers, written in place; on layers made by hand, without vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import checksum
from posttrain.rollout.vllm_layout import Layout
from posttrain.rollout.vllm_lora import attach, overwrite, peft_name, slot_views, write_zero_adapter
from tests.rollout.fake_vllm import Linear, network

RANK = 3
TARGETS = {
    "attn.q_proj": (8, 6),
    "attn.v_proj": (4, 6),
    "attn.o_proj": (6, 8),
    "mlp.up_proj": (10, 6),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return network(
        attn__qkv_proj=Linear([8, 4, 4], 6, bias=True),
        attn__o_proj=Linear([6], 8),
        mlp__gate_up_proj=Linear([10, 10], 6),
    )


def flat_adapter(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, tuple, dict[str, Tensor]]:
    """Buffer, layout and tensors by name; B before A, to be independent of the engine's order."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (outputs, inputs) in reversed(TARGETS.items()):
        tensors[peft_name(name, "B")] = torch.randn(outputs, RANK, generator=generator).to(dtype)
        tensors[peft_name(name, "A")] = torch.randn(RANK, inputs, generator=generator).to(dtype)
    layout, start = [], 0
    for name, tensor in tensors.items():
        layout.append((name, start, tuple(tensor.shape)))
        start += tensor.numel()
    return torch.cat([tensor.view(-1) for tensor in tensors.values()]), tuple(layout), tensors


def attached(root: nn.Module) -> dict[str, Tensor]:
    return attach(Layout.of(root), TARGETS, RANK, torch.empty(0))


def expected_change(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    a, b = (tensors[peft_name(name, side)].double() for side in "AB")
    return x.double() @ a.T @ b.T


def test_each_part_gets_its_own_product_and_no_other() -> None:
    root = model()
    layers = {name: root.get_submodule(name) for name in ("attn.qkv_proj", "attn.o_proj", "mlp.gate_up_proj")}
    inputs = {name: torch.randn(5, layer.weight.shape[1]) for name, layer in layers.items()}
    plain = {name: layer(inputs[name]) for name, layer in layers.items()}
    views = attached(root)
    for name, layer in layers.items():
        assert torch.equal(layer(inputs[name]), plain[name]), "B is zero at first"
    rows = {
        "attn.q_proj": ("attn.qkv_proj", slice(0, 8)),
        "attn.v_proj": ("attn.qkv_proj", slice(12, 16)),
        "attn.o_proj": ("attn.o_proj", slice(0, 6)),
        "mlp.up_proj": ("mlp.gate_up_proj", slice(10, 20)),
    }
    for seed in (1, 2, 1):
        flat, layout, tensors = flat_adapter(seed)
        assert overwrite(views, flat, layout) == checksum(flat)
        change = {name: torch.zeros_like(value).double() for name, value in plain.items()}
        for part, (name, where) in rows.items():
            change[name][:, where] += expected_change(tensors, part, inputs[name])
        for name, layer in layers.items():
            assert torch.allclose(layer(inputs[name]).double() - plain[name], change[name], atol=1e-5)
            three = layer(inputs[name].view(5, 1, -1))
            assert torch.equal(three[:, 0], layer(inputs[name]))


def test_adapters_are_written_in_place() -> None:
    root = model()
    views = attached(root)
    buffers = {name: buffer.data_ptr() for name, buffer in root.named_buffers()}
    assert len(buffers) == 6
    for seed in (1, 2):
        overwrite(views, *flat_adapter(seed)[:2])
    assert {name: buffer.data_ptr() for name, buffer in root.named_buffers()} == buffers
    assert not any("posttrain" in name for name in root.state_dict())


def test_layers_that_are_not_adapted_hold_nothing_and_keep_their_method() -> None:
    root = network(a=Linear([4], 6), b=Linear([4], 6))
    untouched = type(root.b.quant_method)
    attach(Layout.of(root), {"a": (4, 6)}, RANK, torch.empty(0))
    assert [name for name, _ in root.named_buffers()] == ["a.posttrain_lora_a", "a.posttrain_lora_b"]
    assert type(root.b.quant_method) is untouched
    assert isinstance(root.a.quant_method, untouched) and type(root.a.quant_method).__name__ == untouched.__name__


def test_half_precision_rounds_only_where_two_products_must() -> None:
    root = network(attn__o_proj=Linear([6], 8, dtype=torch.bfloat16))
    views = attach(Layout.of(root), {"attn.o_proj": (6, 8)}, RANK, torch.empty(0, dtype=torch.bfloat16))
    flat = torch.randn(RANK * 8 + 6 * RANK).to(torch.bfloat16)
    layout = ((peft_name("attn.o_proj", "A"), 0, (RANK, 8)), (peft_name("attn.o_proj", "B"), RANK * 8, (6, RANK)))
    assert overwrite(views, flat, layout) == checksum(flat)
    x = torch.randn(5, 8).to(torch.bfloat16)
    a, b = flat[: RANK * 8].view(RANK, 8).double(), flat[RANK * 8 :].view(6, RANK).double()
    exact = x.double() @ root.attn.o_proj.weight.double().T + x.double() @ a.T @ b.T
    assert (root.attn.o_proj(x).double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "missing base_model.model.mlp.up_proj.lora_B"),
        ("unknown", "unknown to the engine .*k_proj"),
        ("rank", "the engine holds"),
        ("type", "torch.float16"),
    ],
)
def test_adapter_that_does_not_fit_is_refused_and_nothing_is_written(how: str, message: str) -> None:
    root = model()
    views = attached(root)
    overwrite(views, *flat_adapter(1)[:2])
    before = {name: view.clone() for name, view in views.items()}
    flat, layout, _ = flat_adapter(2)
    if how == "missing":
        layout = layout[1:]
    elif how == "unknown":
        layout = (*layout, (peft_name("attn.k_proj", "A"), flat.numel(), (RANK, 6)))
        flat = torch.cat([flat, torch.zeros(RANK * 6)])
    elif how == "rank":
        name, start, (outputs, rank) = layout[0]
        layout = ((name, start, (rank, outputs)), *layout[1:])
    else:
        flat = flat.half()
    with pytest.raises(EngineError, match=message):
        overwrite(views, flat, layout)
    assert all(torch.equal(views[name], held) for name, held in before.items())


@pytest.mark.parametrize(
    ("name", "sides", "message"),
    [("attn.z_proj", (8, 6), "attn.z_proj"), ("attn.q_proj", (9, 6), r"qkv_proj\[0:8\]")],
)
def test_a_target_the_engine_lacks_is_named(name: str, sides: tuple[int, int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        attach(Layout.of(model()), {name: sides}, RANK, torch.empty(0))


def slots(parts: int, outputs: list[int], inputs: int) -> SimpleNamespace:
    """vLLM's layer with LoRA: two slots, rank 8."""
    return SimpleNamespace(
        lora_a_stacked=tuple(torch.zeros(2, 1, 8, inputs) for _ in range(parts)),
        lora_b_stacked=tuple(torch.zeros(2, 1, size, 8) for size in outputs),
    )


def test_slots_are_written_in_the_adapters_slot_and_rank_only() -> None:
    qkv, o_proj, gate_up = slots(3, [8, 4, 4], 6), slots(1, [6], 8), slots(2, [10, 10], 6)
    modules = {"attn.qkv_proj": qkv, "attn.o_proj": o_proj, "mlp.gate_up_proj": gate_up}
    manager = SimpleNamespace(lora_index_to_id=[None, 7], modules=modules)
    views = slot_views(Layout.of(model()), manager, 7, TARGETS, RANK)
    flat, layout, tensors = flat_adapter(3)
    assert overwrite(views, flat, layout) == checksum(flat)
    assert torch.equal(qkv.lora_a_stacked[2][1, 0, :RANK], tensors[peft_name("attn.v_proj", "A")])
    assert torch.equal(gate_up.lora_b_stacked[1][1, 0, :, :RANK], tensors[peft_name("mlp.up_proj", "B")])
    for module in modules.values():
        for stacked in (*module.lora_a_stacked, *module.lora_b_stacked):
            assert not stacked[0].any()
    assert not qkv.lora_a_stacked[1].any() and not qkv.lora_b_stacked[0][1, 0, :, RANK:].any()
    del modules["attn.o_proj"]
    with pytest.raises(EngineError, match="o_proj"):
        slot_views(Layout.of(model()), manager, 7, TARGETS, RANK)


def test_the_adapter_a_slot_starts_with_is_a_peft_folder_of_zeros(tmp_path: Path) -> None:
    write_zero_adapter(tmp_path, TARGETS, RANK, torch.bfloat16)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == RANK
    assert config["target_modules"] == ["o_proj", "q_proj", "up_proj", "v_proj"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: shape for name, _, shape in flat_adapter(0)[1]
    }
    assert not any(tensor.any() for tensor in tensors.values())
