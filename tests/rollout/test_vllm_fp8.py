"""Our product of vLLM's fp8 layers, input in full; on layers made by hand, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.rl.errors import EngineError
from posttrain.rollout.vllm_export import exported
from posttrain.rollout.vllm_fp8 import use_weight_only
from posttrain.rollout.vllm_layout import Layout
from posttrain.rollout.vllm_lora import attach, overwrite, peft_name
from tests.rollout.fake_vllm import Linear, fp8_linear, network

LIKE = torch.empty(0)
PER_TOKEN = SimpleNamespace(scale=SimpleNamespace(static=False, group_shape=(1, -1)))


def layer_of(kind: str, sizes: list[int], inputs: int) -> tuple[Any, Tensor]:
    """A layer as vLLM leaves it, and its weight in float64."""
    layer: Any = fp8_linear(sizes, inputs)
    layer.quant_method.activation_quant_key = PER_TOKEN
    layer.bias = nn.Parameter(torch.randn(sum(sizes)), requires_grad=False)
    rows = layer.weight.data
    if kind == "square":
        scale = torch.rand(-(-sum(sizes) // 128), -(-inputs // 128)) + 0.5
        layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: sum(sizes), :inputs]
        return layer, rows.double() * spread.double()
    scale = torch.rand(1) + 0.5 if kind == "one" else torch.rand(sum(sizes), 1) + 0.5
    padding = [-side % 16 for side in (inputs, sum(sizes))]
    stored = nn.functional.pad(rows.view(torch.uint8), (0, padding[0], 0, padding[1]), value=0x7F)  # NaN
    layer.weight = nn.Parameter(stored.view(rows.dtype).t(), requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    return layer, rows.double() * scale.double()


@pytest.mark.parametrize("kind", ["one", "row", "square"])
def test_the_product_is_exact_in_the_input_with_and_without_an_adapter(kind: str) -> None:
    torch.manual_seed(0)
    fused, fused_weight = layer_of(kind, [128, 72], 140)
    plain, plain_weight = layer_of(kind, [40], 200)
    method = type(fused.quant_method)
    root = network(mlp__gate_up_proj=fused, mlp__down_proj=plain, attn__o_proj=Linear([6], 8))
    use_weight_only(root, LIKE)
    assert type(fused.quant_method).__name__ == method.__name__ and isinstance(fused.quant_method, method)
    assert type(root.attn.o_proj.quant_method) is method, "only fp8 layers change"
    x = torch.randn(3, 2, 140)
    expected = x.double() @ fused_weight.T + fused.bias.double()
    torch.testing.assert_close(fused(x).double(), expected, rtol=1e-5, atol=1e-4)
    short = torch.randn(5, 200)
    torch.testing.assert_close(
        plain(short).double(), short.double() @ plain_weight.T + plain.bias.double(), rtol=1e-5, atol=1e-4
    )

    views = attach(Layout.of(root), {"mlp.up_proj": (72, 140)}, 2, LIKE)
    a, b = torch.randn(2, 140), torch.randn(72, 2)
    layout = ((peft_name("mlp.up_proj", "A"), 0, (2, 140)), (peft_name("mlp.up_proj", "B"), 280, (72, 2)))
    overwrite(views, torch.cat([a.view(-1), b.view(-1)]), layout)
    expected[..., 128:] += x.double() @ a.double().T @ b.double().T
    torch.testing.assert_close(fused(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("ours", "activations"), [(True, None), (False, "token")])
def test_the_export_says_whether_inputs_are_rounded(ours: bool, activations: str | None) -> None:
    layer, _ = layer_of("row", [16, 16], 32)
    root = network(mlp__gate_up_proj=layer)
    if ours:
        use_weight_only(root, LIKE)
        attach(Layout.of(root), {"mlp.up_proj": (16, 32)}, 2, LIKE)
    weights, _ = exported(Layout.of(root), {"mlp.up_proj.weight": (16, 32)})
    assert weights["mlp.up_proj.weight"].repacked is None
    assert weights["mlp.up_proj.weight"].activations == activations


def test_nothing_is_copied_and_nothing_is_saved() -> None:
    layer, _ = layer_of("one", [16], 32)
    use_weight_only(network(o_proj=layer), LIKE)
    assert layer.posttrain_fp8_weight.data_ptr() == layer.weight.data_ptr()
    assert layer.posttrain_fp8_scale.data_ptr() == layer.weight_scale.data_ptr()
    assert not any("posttrain" in name for name in layer.state_dict())


def test_a_layer_that_only_vllm_can_read_is_refused_with_the_way_out() -> None:
    layer, _ = layer_of("one", [16], 32)
    layer.quant_method.fp8_linear = type("SomeOtherKernel", (), {})()
    with pytest.raises(EngineError, match=r"o_proj .* for SomeOtherKernel: use rollout.fp8_activations = true"):
        use_weight_only(network(o_proj=layer), LIKE)


def test_the_operation_is_one_node_of_a_traced_graph() -> None:
    layer, weight = layer_of("row", [16], 32)
    use_weight_only(network(o_proj=layer), LIKE)
    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    traced = torch.compile(layer.forward, backend=keep, fullgraph=True, dynamic=True)
    x = torch.randn(5, 32)
    expected = x.double() @ weight.T + layer.bias.double()
    torch.testing.assert_close(traced(x).double(), expected, rtol=1e-5, atol=1e-4)
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "fp8_linear" in str(target)] == [torch.ops.posttrain.fp8_linear]
    arguments = (x, layer.posttrain_fp8_weight, layer.posttrain_fp8_scale, layer.bias, layer.posttrain_fp8_locks)
    torch.library.opcheck(torch.ops.posttrain.fp8_linear.default, arguments, test_utils="test_faketensor")
