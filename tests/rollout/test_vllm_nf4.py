"""Our product of vLLM's bitsandbytes layers; on layers made by hand, without vLLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.kernels.reference import NF4_CODE
from posttrain.rl.sharing import opened
from posttrain.rollout.vllm_export import exported
from posttrain.rollout.vllm_layout import Layout
from posttrain.rollout.vllm_lora import attach, overwrite, peft_name
from posttrain.rollout.vllm_nf4 import use_packed_product
from tests.rollout.fake_vllm import Linear, network

functional = pytest.importorskip("bitsandbytes.functional")
LIKE = torch.empty(0)


def layer_of(sizes: list[int], inputs: int, seed: int = 0, **options: Any) -> tuple[Any, Tensor]:
    """A fused layer as vLLM's bitsandbytes loader leaves it, and its weight in float64, weight by weight."""
    generator = torch.Generator().manual_seed(seed)
    layer: Any = Linear(sizes, inputs)
    layer.bias = nn.Parameter(torch.randn(sum(sizes), generator=generator), requires_grad=False)
    options = {"quant_type": "nf4", "compress_statistics": False} | options
    dense = [torch.randn(size, inputs, generator=generator) * (1 + index) for index, size in enumerate(sizes)]
    packed, states = zip(*(functional.quantize_4bit(part, **options) for part in dense))
    layer.weight = nn.Parameter(torch.cat([part.view(-1, 1) for part in packed]), requires_grad=False)
    layer.weight.bnb_quant_state = dict(enumerate(states))
    layer.weight.bnb_shard_offsets = torch.tensor([0, *(part.numel() for part in packed)]).cumsum(0)
    rows = []
    for bits, state, size in zip(packed, states, sizes):
        pairs = torch.stack([bits.flatten() >> 4, bits.flatten() & 15], 1).flatten()[: size * inputs].int()
        absmax = (
            functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        )
        scale = absmax.double().repeat_interleave(state.blocksize)[: size * inputs]
        code = torch.tensor(NF4_CODE) if state.quant_type == "nf4" else state.code
        rows.append((code.double()[pairs] * scale).view(size, inputs))
    return layer, torch.cat(rows)


def test_one_product_for_all_parts_with_and_without_an_adapter() -> None:
    fused, fused_weight = layer_of([16, 8, 8], 128)
    plain, plain_weight = layer_of([40], 192, seed=1)
    method = type(fused.quant_method)
    root = network(mlp__gate_up_proj=Linear([6, 6], 8), attn__qkv_proj=fused, attn__o_proj=plain)
    use_packed_product(root, LIKE)
    assert type(fused.quant_method).__name__ == method.__name__ and isinstance(fused.quant_method, method)
    assert type(root.mlp.gate_up_proj.quant_method) is method, "only nf4 layers change"
    x = torch.randn(3, 2, 128)
    expected = x.double() @ fused_weight.T + fused.bias.double()
    torch.testing.assert_close(fused(x).double(), expected, rtol=1e-5, atol=1e-4)
    short = torch.randn(5, 192)
    torch.testing.assert_close(
        plain(short).double(), short.double() @ plain_weight.T + plain.bias.double(), rtol=1e-5, atol=1e-4
    )

    views = attach(Layout.of(root), {"attn.k_proj": (8, 128)}, 2, LIKE)
    a, b = torch.randn(2, 128), torch.randn(8, 2)
    layout = ((peft_name("attn.k_proj", "A"), 0, (2, 128)), (peft_name("attn.k_proj", "B"), 256, (8, 2)))
    overwrite(views, torch.cat([a.view(-1), b.view(-1)]), layout)
    expected[..., 16:24] += x.double() @ a.double().T @ b.double().T
    torch.testing.assert_close(fused(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_half_precision_stays_what_it_is() -> None:
    layer, weight = layer_of([16], 128)
    use_packed_product(network(o_proj=layer), LIKE)
    layer.bias = None
    x = torch.randn(5, 128).half()
    y = layer(x)
    exact = x.double() @ weight.T
    assert y.dtype == torch.float16 and (y.double() - exact).abs().max() < 2e-3 * exact.abs().max()


def test_absmax_is_held_once_and_what_the_trainer_gets_is_unchanged() -> None:
    shapes = {"attn.q_proj.weight": (16, 128), "attn.k_proj.weight": (8, 128), "attn.v_proj.weight": (8, 128)}
    layer, weight = layer_of([16, 8, 8], 128)
    root = network(attn__qkv_proj=layer)
    before, _ = exported(Layout.of(root), shapes)
    use_packed_product(root, LIKE)
    after, _ = exported(Layout.of(root), shapes)
    assert {name: shared.checksums for name, shared in before.items()} == {
        name: shared.checksums for name, shared in after.items()
    }
    whole = layer.posttrain_nf4_absmax
    assert whole.numel() == weight.numel() // 64
    for shared in after.values():
        assert opened(shared.tensors["absmax"]).untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert layer.posttrain_nf4_weight.data_ptr() == layer.weight.data_ptr()
    assert not any("posttrain" in name for name in layer.state_dict())


@pytest.mark.parametrize(
    ("options", "inputs", "reason"),
    [
        ({"quant_type": "fp4"}, 128, "it is fp4"),
        ({"compress_statistics": True}, 128, "its absmax is quantized"),
        ({}, 96, "its 96 inputs are not whole blocks of 64"),
        ({"blocksize": 256}, 128, "its 128 inputs are not whole blocks of 256"),
    ],
)
def test_other_layers_keep_vllms_product_and_the_log_names_them(
    options: dict[str, Any], inputs: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer, _ = layer_of([16, 8], inputs, **options)
    method = type(layer.quant_method)
    use_packed_product(network(mlp__gate_up_proj=layer), LIKE)
    assert type(layer.quant_method) is method and not hasattr(layer, "posttrain_nf4_weight")
    assert caplog.messages == [f"mlp.gate_up_proj keeps vLLM's own product: {reason}"]


def test_another_code_book_keeps_vllms_product(caplog: pytest.LogCaptureFixture) -> None:
    layer, _ = layer_of([16], 128)
    layer.weight.bnb_quant_state[0].code = layer.weight.bnb_quant_state[0].code * 0.5
    use_packed_product(network(o_proj=layer), LIKE)
    assert not hasattr(layer, "posttrain_nf4_weight") and "code book" in caplog.text


def test_the_operation_is_one_node_of_a_traced_graph() -> None:
    layer, weight = layer_of([16, 8], 128)
    use_packed_product(network(mlp__gate_up_proj=layer), LIKE)
    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    traced = torch.compile(layer.forward, backend=keep, fullgraph=True, dynamic=True)
    x = torch.randn(5, 128)
    torch.testing.assert_close(traced(x).double(), x.double() @ weight.T + layer.bias.double(), rtol=1e-5, atol=1e-4)
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "nf4_linear" in str(target)] == [torch.ops.posttrain.nf4_linear]
    held = (layer.posttrain_nf4_weight, layer.posttrain_nf4_absmax, 64, layer.bias, layer.posttrain_nf4_locks)
    torch.library.opcheck(torch.ops.posttrain.nf4_linear.default, (x, *held), test_utils="test_faketensor")
