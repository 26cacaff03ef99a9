"""Which bytes of the engine stand for which transformers parameter; on modules made by hand, without vLLM."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.rl.fingerprint import checksum
from posttrain.rl.sharing import opened
from posttrain.rl.types import SharedWeight
from posttrain.rollout.vllm_export import exported
from posttrain.rollout.vllm_layout import Layout
from tests.rollout.fake_vllm import Embedding, Linear, fp8_linear, network, wrapped


def export(root: nn.Module, **shapes: tuple[int, ...]) -> dict[str, SharedWeight]:
    return exported(Layout.of(root), {name.replace("__", "."): shape for name, shape in shapes.items()})[0]


def one(root: nn.Module, name: str, shape: tuple[int, ...]) -> SharedWeight:
    return exported(Layout.of(root), {name: shape})[0][name]


def tensors(weight: SharedWeight) -> dict[str, Tensor]:
    """The tensors behind a weight, their checksums confirmed."""
    assert weight.repacked is None, weight.repacked
    found = {name: opened(shared) for name, shared in weight.tensors.items()}
    assert weight.checksums == {name: checksum(tensor) for name, tensor in found.items()}
    return found


def test_parts_of_fused_layers_are_row_slices_of_one_storage() -> None:
    qkv, gate_up = Linear([8, 4, 4], 6, bias=True), Linear([10, 10], 6)
    root = network(model__layers__0__attn__qkv_proj=qkv, model__layers__0__mlp__gate_up_proj=gate_up)
    names = {f"model.layers.0.attn.{part}_proj": size for part, size in (("q", 8), ("k", 4), ("v", 4))}
    shapes = {f"{name}.weight": (size, 6) for name, size in names.items()}
    shapes |= {f"{name}.bias": (size,) for name, size in names.items()}
    shapes |= {f"model.layers.0.mlp.{part}_proj.weight": (10, 6) for part in ("gate", "up")}
    weights, _ = exported(Layout.of(root), shapes)
    assert list(weights) == list(shapes)
    rows = {"q": slice(0, 8), "k": slice(8, 12), "v": slice(12, 16)}
    for part, where in rows.items():
        weight = tensors(weights[f"model.layers.0.attn.{part}_proj.weight"])["weight"]
        assert torch.equal(weight, qkv.weight.data[where])
        assert weight.untyped_storage().data_ptr() == qkv.weight.untyped_storage().data_ptr()
        bias = tensors(weights[f"model.layers.0.attn.{part}_proj.bias"])["weight"]
        assert torch.equal(bias, qkv.bias.data[where])
    up = weights["model.layers.0.mlp.up_proj.weight"]
    assert up.origin == "model.layers.0.mlp.gate_up_proj[10:20].weight"
    assert tensors(up)["weight"].data_ptr() == gate_up.weight.data_ptr() + 10 * 6 * 4
    gate_up.weight.data[10, 0] = 77.0
    assert opened(up.tensors["weight"])[0, 0] == 77.0


def test_vocabulary_padding_is_cut_off_and_wrapped_layers_keep_their_names() -> None:
    embedding, layer, norm = Embedding(64, 50, 6), Linear([4], 6), nn.LayerNorm(6)
    root = network(model__embed_tokens=embedding, model__o_proj=wrapped(layer), model__norm=norm)
    weights = export(root, model__embed_tokens__weight=(50, 6), model__o_proj__weight=(4, 6), model__norm__weight=(6,))
    found = {name: tensors(weight)["weight"] for name, weight in weights.items()}
    assert found["model.embed_tokens.weight"].data_ptr() == embedding.weight.data_ptr()
    assert torch.equal(found["model.embed_tokens.weight"], embedding.weight.data[:50])
    assert found["model.o_proj.weight"].data_ptr() == layer.weight.data_ptr()
    assert found["model.norm.weight"].data_ptr() == norm.weight.data_ptr()


def test_names_go_through_the_models_own_mapper() -> None:
    class Mapper:
        def get_unstacked_mapper(self) -> Mapper:
            return self

        def _map_name(self, name: str) -> str:
            return name.replace("model.language_model.", "language_model.model.")

    layer = Linear([4, 4], 6)
    root = network(language_model__model__gate_up_proj=layer)
    root.hf_to_vllm_mapper = Mapper()  # type: ignore[assignment]
    weight = one(root, "model.language_model.up_proj.weight", (4, 6))
    assert torch.equal(tensors(weight)["weight"], layer.weight.data[4:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("gone", "no tensor"),
        ("shape", r"torch.float32 \(4, 6\)"),
        ("int32", "torch.int32"),
        ("transposed", "strides"),
        ("onednn", "oneDNN"),
    ],
)
def test_a_weight_in_a_form_of_its_own_is_named_and_not_shared(change: str, reason: str) -> None:
    layer: Any = Linear([4], 6)
    if change == "int32":
        layer.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int32), requires_grad=False)
    elif change == "transposed":
        layer.weight.data = torch.zeros(6, 4).t()
    elif change == "onednn":
        layer.cpu_linear, layer.weight.data = object(), torch.empty(0)
    name = "other.weight" if change == "gone" else "o_proj.weight"
    weight = one(network(o_proj=layer), name, (5, 6) if change == "shape" else (4, 6))
    assert weight.repacked is not None and not weight.tensors and not weight.checksums
    assert weight.scheme == "dense"
    assert re.search(reason, weight.repacked)


# -- nf4 --------------------------------------------------------------------------------------------------------------


def nf4_layer(weights: list[Tensor], *, nested: bool = False) -> Any:
    """A fused layer as vLLM's bitsandbytes loader leaves it: packed parts end to end, a state and an offset each."""
    functional = pytest.importorskip("bitsandbytes.functional")
    layer: Any = Linear([weight.shape[0] for weight in weights], weights[0].shape[1])
    packed, states = zip(*(functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested) for w in weights))
    layer.weight = nn.Parameter(torch.cat([part.view(-1, 1) for part in packed]), requires_grad=False)
    layer.weight.bnb_quant_state = dict(enumerate(states))
    layer.weight.bnb_shard_offsets = torch.tensor([0, *(part.numel() for part in packed)]).cumsum(0)
    return layer


def dequantized(weight: SharedWeight) -> Tensor:
    """Code book and absmax by hand: two weights a byte, the first in the high half."""
    found = tensors(weight)
    packed = found["weight"].view(-1).to(torch.int64)
    indices = torch.stack([packed >> 4, packed & 15], 1).view(-1)
    absmax = found["absmax"].repeat_interleave(weight.block_size or 0)[: indices.numel()]
    return (found["code"][indices] * absmax).view(weight.shape)


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_parts_are_byte_slices_with_their_own_scales(nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    parts = [torch.randn(16, 64), torch.randn(8, 64) * 3, torch.randn(8, 64)]
    layer = nf4_layer(parts, nested=nested)
    root = network(attn__qkv_proj=layer)
    for index, (name, part) in enumerate(zip("qkv", parts)):
        weight = one(root, f"attn.{name}_proj.weight", tuple(part.shape))
        assert (weight.scheme, weight.block_size, weight.shape) == ("nf4", 64, tuple(part.shape))
        assert tensors(weight)["absmax"].dtype == torch.float32
        state = layer.weight.bnb_quant_state[index]
        bytes_ = tensors(weight)["weight"]
        expected = functional.dequantize_4bit(bytes_, state)
        assert torch.allclose(dequantized(weight), expected, rtol=1e-6, atol=1e-7)
        assert (dequantized(weight) - part).abs().max() < 0.2 * part.abs().max()
        assert bytes_.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()


def test_nf4_in_pieces_for_one_transformers_weight_is_not_shared() -> None:
    layer = nf4_layer([torch.randn(8, 64), torch.randn(8, 64)])
    weight = one(network(mlp__gate_up_proj=layer), "mlp.gate_up_proj.weight", (16, 64))
    assert "2 pieces" in str(weight.repacked) and weight.scheme == "nf4"


def test_other_four_bit_codes_are_not_shared() -> None:
    layer = nf4_layer([torch.randn(8, 64)])
    layer.weight.bnb_quant_state[0].quant_type = "fp4"
    weight = one(network(o_proj=layer), "o_proj.weight", (8, 64))
    assert "fp4" in str(weight.repacked) and weight.scheme == "dense"


# -- fp8 --------------------------------------------------------------------------------------------------------------


def product(weight: SharedWeight) -> Tensor:
    """Weight times scale, blocks spread out by hand."""
    found = tensors(weight)
    scale = found["scale"]
    if scale.ndim == 2 and scale.shape[1] > 1:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    return found["weight"].float() * scale


@pytest.mark.parametrize("scales", ["tensor", "channel"])
@pytest.mark.parametrize("padded", [False, True])
def test_fp8_is_stored_transposed_and_cut_by_rows(scales: str, padded: bool) -> None:
    torch.manual_seed(0)
    layer: Any = fp8_linear([16, 8], 24 if padded else 32)
    rows = layer.weight.data.clone()
    inputs = rows.shape[1]
    scale = torch.tensor([0.5]) if scales == "tensor" else torch.rand(24, 1) + 0.5
    stored = nn.functional.pad(rows.view(torch.uint8), (0, 8, 0, 8)).view(rows.dtype) if padded else rows
    layer.weight = nn.Parameter(stored.t(), requires_grad=False)
    kept = nn.functional.pad(scale, (0, 0, 0, 8), value=1.0) if padded and scales == "channel" else scale
    layer.weight_scale = nn.Parameter(kept, requires_grad=False)
    root = network(mlp__gate_up_proj=layer)
    expected = rows.float() * scale
    for name, where in (("gate", slice(0, 16)), ("up", slice(16, 24))):
        weight = one(root, f"mlp.{name}_proj.weight", (where.stop - where.start, inputs))
        assert weight.scheme == "fp8" and weight.tensors.keys() == {"weight", "scale"}
        assert torch.equal(product(weight), expected[where])
        assert tensors(weight)["weight"].untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
        assert tensors(weight)["scale"].shape == ((1,) if scales == "tensor" else (where.stop - where.start, 1))


def test_fp8_blocks_are_cut_only_between_blocks() -> None:
    torch.manual_seed(0)
    layer: Any = fp8_linear([256, 128, 100], 200, "DeepGemmFp8BlockScaledMMKernel")
    scale = torch.rand(4, 2) + 0.5
    layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    expected = layer.weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:484, :200]
    root = network(attn__qkv_proj=layer)
    for name, where in (("q", slice(0, 256)), ("k", slice(256, 384)), ("v", slice(384, 484))):
        weight = one(root, f"attn.{name}_proj.weight", (where.stop - where.start, 200))
        assert torch.equal(product(weight), expected[where])
    layer.output_partition_sizes = [256, 100, 128]
    assert "cut a block" in str(one(root, "attn.k_proj.weight", (100, 200)).repacked)
    assert "cut a block" in str(one(root, "attn.v_proj.weight", (128, 200)).repacked)


@pytest.mark.parametrize("change", ["kernel", "orientation", "scales", "scale type"])
def test_fp8_laid_out_for_one_kernel_is_not_shared(change: str) -> None:
    layer: Any = fp8_linear(
        [16], 16, "MarlinFP8ScaledMMLinearKernel" if change == "kernel" else "CutlassFP8ScaledMMLinearKernel"
    )
    scale = torch.rand(3 if change == "scales" else 1)
    layer.weight_scale = nn.Parameter(scale.half() if change == "scale type" else scale, requires_grad=False)
    if change != "orientation":  # a square weight tells its orientation by its strides alone
        layer.weight = nn.Parameter(layer.weight.data.t(), requires_grad=False)
    layer.bias = nn.Parameter(torch.zeros(3), requires_grad=False)
    weights = export(network(o_proj=layer), o_proj__weight=(16, 16), o_proj__bias=(16,))
    assert all(weight.repacked is not None for weight in weights.values())
    assert {name: weight.scheme for name, weight in weights.items()} == {"o_proj.weight": "fp8", "o_proj.bias": "dense"}
