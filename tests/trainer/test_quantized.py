"""Quantized linear layers: against explicit dequantization in float64, bitsandbytes' own layer, and peft over it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from posttrain.rl import algorithms
from posttrain.rl.config import ModelConfig, TrainerConfig
from posttrain.rl.errors import EngineError
from posttrain.trainer.quantized import (
    Fp8Linear,
    Nf4Linear,
    QuantizedLinear,
    nf4_code,
    quantized,
    round_to_fp8,
    use_kernels,
)
from posttrain.trainer.trainer import Trainer

from .tiny import gradients, packed, save_tiny, sequences, wake_adapter

bitsandbytes = pytest.importorskip("bitsandbytes")
SHAPES = [(40, 64), (9, 41), (64, 192), (3, 1), (130, 300)]
LENGTHS = [3, 9, 2, 14, 6, 1, 11]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def nf4_by_hand(layer):
    """float64 [O, I]: the high half of each byte comes first, a block is 64 weights in row-major order."""
    bits = layer.weight.flatten().long()
    codes = torch.stack([bits >> 4, bits & 15], dim=1).flatten()[: layer.out_features * layer.in_features]
    scale = layer.absmax.double().repeat_interleave(layer.block_size)[: len(codes)]
    return (layer.code.double()[codes] * scale).view(layer.out_features, layer.in_features)


def fp8_by_hand(layer):
    """float64 [O, I]: each weight times the scale that is its own."""
    scale = layer.scale.double()
    rows, columns = torch.arange(layer.out_features)[:, None], torch.arange(layer.in_features)
    if scale.numel() == 1:
        factors = scale.flatten()[0].expand(layer.out_features, layer.in_features)
    elif scale.shape == (layer.out_features, 1):
        factors = scale[rows, columns * 0]
    else:
        factors = scale[rows // 128, columns // 128]
    return layer.weight.view(torch.float8_e4m3fn).double() * factors


def fp8_layer(shape, scales, dtype, transposed=False):
    bits = random(*shape, seed=1).mul(50).to(torch.float8_e4m3fn)
    if transposed:
        bits = bits.T.contiguous().T
    size = {"one": (1,), "bare": (), "row": (shape[0], 1)}.get(scales, tuple(math.ceil(side / 128) for side in shape))
    return Fp8Linear({"weight": bits, "scale": 0.01 * random(*size, seed=2).abs().float() + 0.003}, shape, dtype)


def rounded_by_hand(x, group):
    """Nearest float8_e4m3fn values under each group's own scale, by search over all of them, in float64."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[values.isfinite()]
    out = torch.empty_like(x)
    for row, result in zip(x, out, strict=True):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            scale = max(part.abs().max().item() / 448, 1 / (448 * 512))
            nearest = (part[:, None] / scale - values).abs().argmin(1)
            result[start : start + group] = values[nearest] * scale
    return out


@pytest.mark.parametrize(("activations", "group"), [("token", 256), ("group", 128)])
def test_inputs_are_rounded_as_the_engine_rounds_them_and_the_gradient_passes(activations, group):
    layer = fp8_layer((6, 256), "row", torch.float32)
    layer.activations = activations
    layer.bias = torch.nn.Parameter(random(6, seed=5), requires_grad=False)
    x = (random(3, 256, seed=3) * torch.tensor([[1.0], [1e-9], [40.0]])).requires_grad_(True)
    weight = layer.dequantized(torch.float32).double()
    rounded = rounded_by_hand(x.detach().double(), group)
    expected = rounded @ weight.T + layer.bias.double()
    y = layer(x)
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y[0].double(), (x[0].double() @ weight.T + layer.bias.double()), rtol=1e-4, atol=1e-4)
    y.backward(random(3, 6, seed=4))
    assert torch.allclose(x.grad.double(), random(3, 6, seed=4).double() @ weight, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("scales", ["one", "row"])
def test_fp8_tensor_cores_give_the_rounded_product(scales):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("rows and columns under scales of their own need compute capability 9.0")
    layer = fp8_layer((64, 256), scales, torch.bfloat16)
    layer.activations = "token"
    layer.bias = torch.nn.Parameter(random(64, seed=5).bfloat16(), requires_grad=False)
    layer = layer.to("cuda")
    x = random(2, 5, 256, seed=3).bfloat16().to("cuda")
    assert layer._on_tensor_cores(x)
    bits, scale = round_to_fp8(x.double().float(), 256)
    exact = (bits.double() * scale.double()).flatten(-2) @ layer.dequantized(torch.float64).T + layer.bias.double()
    assert torch.allclose(layer(x).double(), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nf4_is_code_times_absmax(shape, dtype):
    layer = quantized(random(*shape, dtype=dtype), "nf4")
    assert isinstance(layer, Nf4Linear) and layer.weight.dtype == torch.uint8
    expected = nf4_by_hand(layer)
    assert (expected - random(*shape)).abs().max() < 0.17 * random(*shape).abs().max()  # half of NF4's widest gap
    # bitsandbytes multiplies in float32 and rounds the product to the output's type
    assert torch.equal(layer.dequantized(dtype), expected.float().to(dtype))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scales", ["one", "bare", "row", "block"])
@pytest.mark.parametrize("shape", [(9, 41), (40, 64), (130, 300), (256, 128)])
def test_fp8_is_bits_times_scale_rounded_once(shape, scales, transposed):
    for dtype in (torch.float32, torch.bfloat16):
        layer = fp8_layer(shape, scales, dtype, transposed)
        exact = fp8_by_hand(layer)
        # e4m3 times float32 has 28 significant bits at most: float64 holds it, and its float32 is the kernel's product
        assert torch.equal(layer.dequantized(dtype), exact.float().to(dtype))


def test_fp8_quantization_keeps_the_largest_and_three_bits_of_the_rest():
    weight = random(40, 64, dtype=torch.float32)
    layer = quantized(weight, "fp8")
    found = layer.dequantized(torch.float32)
    torch.testing.assert_close(layer.scale, weight.abs().max().reshape(1) / 448)
    assert found.abs().max() == pytest.approx(weight.abs().max().item(), rel=1e-6)
    gap = (found - weight).abs()
    assert (gap <= weight.abs() / 16 + layer.scale * 2**-10 + 1e-7).all()
    assert torch.equal(quantized(torch.zeros(4, 4), "fp8").dequantized(torch.float32), torch.zeros(4, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
@pytest.mark.parametrize("biased", [False, True])
def test_forward_and_input_gradient_equal_dequantize_then_multiply(dtype, scheme, biased):
    layer = quantized(random(40, 64, dtype=dtype), scheme)
    if biased:
        layer.bias = nn.Parameter(random(40, seed=3, dtype=dtype), requires_grad=False)
    weight = nf4_by_hand(layer) if scheme == "nf4" else fp8_by_hand(layer)
    x = random(2, 5, 64, seed=4, dtype=dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y = layer(x)
    expected = F.linear(exact, weight, None if layer.bias is None else layer.bias.double())
    direction = random(*y.shape, seed=5)
    (y * direction.to(dtype)).sum().backward()
    (expected * direction.to(dtype).double()).sum().backward()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * exact.grad.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_the_input_gradient_is_gradient_times_weight(dtype, scheme):
    layer = quantized(random(40, 64, dtype=dtype), scheme)
    layer.bias = nn.Parameter(random(40, seed=3, dtype=dtype), requires_grad=False)
    weight = (nf4_by_hand(layer) if scheme == "nf4" else fp8_by_hand(layer)).float().double()
    gradient = random(3, 5, 40, seed=4, dtype=dtype)
    found = layer.input_gradient(gradient)
    assert found.shape == (3, 5, 64) and found.dtype == dtype
    torch.testing.assert_close(found.double(), gradient.double() @ weight, rtol=1e-5, atol=1e-5)


def test_one_call_chooses_what_dequantizes_in_every_layer():
    model = nn.Sequential(
        quantized(random(8, 64), "nf4"), nn.Linear(8, 8), nn.Sequential(quantized(random(8, 8), "fp8"))
    )
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert [layer.kernels for layer in layers] == ["reference", "reference"]
    use_kernels(model, "triton")
    assert [layer.kernels for layer in layers] == ["triton", "triton"] and not hasattr(model[1], "kernels")
    use_kernels(model, "reference")
    assert [layer.kernels for layer in layers] == ["reference", "reference"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_the_layer_of_bitsandbytes(dtype):
    dense = nn.Linear(64, 40, bias=True, dtype=dtype)
    theirs = bitsandbytes.nn.Linear4bit(64, 40, bias=True, compute_dtype=dtype, compress_statistics=False,
                                        quant_type="nf4")  # fmt: skip
    theirs.load_state_dict(dense.state_dict())
    theirs.support_avx512bf16_for_cpu = False
    theirs = theirs.to("cpu")
    ours = quantized(dense.weight.detach(), "nf4")
    ours.bias = nn.Parameter(dense.bias.detach(), requires_grad=False)
    assert torch.equal(ours.weight.flatten(), theirs.weight.data.flatten())
    assert torch.equal(ours.absmax, theirs.weight.quant_state.absmax) and torch.equal(ours.code, nf4_code("cpu"))
    x, y = (random(7, 64, seed=6, dtype=dtype).requires_grad_() for _ in range(2))
    one, two = ours(x), theirs(y)
    assert torch.equal(one, two)
    one.sum().backward()
    two.sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama", hidden_size=64, intermediate_size=128)


def trainer_of(folder, scheme, dtype="float32", **settings):
    config = TrainerConfig(device="cpu", **settings)
    return Trainer(folder, ModelConfig(name=str(folder), dtype=dtype, quantization=scheme), config, seed=0)


def peft_gradients(model, batch, advantage_of_t, names):
    """Of −Σ advantage·logprob / tokens over the sequences one by one, with plain peft."""
    loss = torch.zeros((), dtype=torch.float64)
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        ids = batch.input_ids[start:stop]
        table = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
        logprobs = table.gather(1, ids[1:, None]).squeeze(1)
        keep = batch.loss_mask[start + 1 : stop]
        loss = loss - (logprobs.double() * advantage_of_t[start + 1 : stop] * keep).sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in names(model).items()}


class WeightedSum:
    """Policy gradient without ratios or clipping: −Σ advantage·logprob."""

    needs_entropy_gradient = False

    def loss(self, inputs):
        kept = torch.where(inputs.loss_mask, inputs.logprobs * inputs.advantages, 0.0)
        return algorithms.LossOutput(-kept.sum())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_over_nf4_equals_peft_over_bitsandbytes(folder, dtype):
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    trainer = trainer_of(folder, "nf4", dtype)
    wake_adapter(trainer)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), quantization_config=quantization, device_map={"": "cpu"}
    )
    layers = [module for module in base.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    exported = trainer.export_adapter()
    theirs = peft.get_peft_model(base, peft.LoraConfig.from_peft_type(**{**exported.config, "inference_mode": False}))
    peft.set_peft_model_state_dict(theirs, dict(exported.tensors))
    theirs.eval()
    batch = packed(sequences(LENGTHS))
    found = peft_gradients(theirs, batch, batch.advantages.double(), lambda model: {
        name.replace(".default.", "."): parameter for name, parameter in model.named_parameters() if ".lora_" in name
    })  # fmt: skip
    trainer.forward_backward([batch], WeightedSum())
    ours = gradients(trainer)
    assert ours.keys() == found.keys() and len(ours) == 28
    worst = max(((ours[name] - found[name]).norm() / found[name].norm()).item() for name in ours)
    assert worst < (1e-4 if dtype == "float32" else 0.1)
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_gradient_equals_that_over_the_dequantized_model(folder, scheme, checkpointing):
    trainer = trainer_of(folder, scheme, "float64", activation_checkpointing=checkpointing)
    layers = {name: layer for name, layer in trainer.base_weights().items() if isinstance(layer, QuantizedLinear)}
    dense = Trainer(folder, ModelConfig(name=str(folder), dtype="float64"), TrainerConfig(device="cpu"), seed=0)
    with torch.no_grad():
        for name, layer in layers.items():
            exact = nf4_by_hand(layer).float() if scheme == "nf4" else fp8_by_hand(layer)
            dense.base_weights()[f"{name}.weight"].copy_(exact)
    batch, found = packed(sequences(LENGTHS)), []
    for one in (trainer, dense):
        wake_adapter(one)
        found.append((one.score([batch])[0].logprobs, one.forward_backward([batch], algorithms.parse("grpo"))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-10)
    ours, theirs = gradients(trainer), gradients(dense)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12) for name in theirs)
    assert max(gradient.abs().max() for gradient in ours.values()) > 1e-4


@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_nothing_of_a_weights_size_is_saved_for_the_backward_pass(folder, scheme):
    trainer = trainer_of(folder, scheme, lora={"rank": 2})
    wake_adapter(trainer)
    sizes = {64 * 64, 32 * 64, 64 * 128}  # of the dequantized layers: q/o, k/v, mlp
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        trainer.forward_backward([packed(sequences([5, 3]))], algorithms.parse("grpo"))
    assert saved and not [tensor.shape for tensor in saved if tensor.numel() in sizes]
    saved.clear()
    dense = Trainer(folder, ModelConfig(name=str(folder), dtype="float32"), TrainerConfig(device="cpu"), seed=0)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        dense.forward_backward([packed(sequences([5, 3]))], algorithms.parse("grpo"))
    assert [tensor.shape for tensor in saved if tensor.numel() in sizes], "the test would not see a kept weight"


@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_the_head_embeddings_and_norms_stay_dense(folder, scheme):
    base = trainer_of(folder, scheme, "bfloat16").base_weights()
    layers = {name for name, held in base.items() if isinstance(held, QuantizedLinear)}
    assert len(layers) == 14 and all(name.endswith("_proj") for name in layers)
    dense = {name: held for name, held in base.items() if name not in layers}
    assert {held.dtype for held in dense.values()} == {torch.bfloat16}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= dense.keys()
    assert not any("_proj" in name for name in dense)  # a layer's bias goes with the layer
    assert all(base[name].bias is not None for name in layers if name.endswith("q_proj"))


@pytest.mark.parametrize("scheme,state", [("nf4", "absmax"), ("fp8", "scale")])
def test_checksum_sees_quantized_bits_and_their_scale(folder, scheme, state):
    trainer = trainer_of(folder, scheme)
    before = trainer.checksum()
    layer = trainer.base_weights()["model.layers.1.mlp.down_proj"]
    for tensor in (layer.weight.data, getattr(layer, state)):
        kept = tensor.clone()
        tensor.view(-1)[-1:].mul_(2) if tensor.is_floating_point() else tensor.view(-1)[-1:].bitwise_xor_(1)
        assert trainer.checksum() != before
        tensor.copy_(kept)
        assert trainer.checksum() == before


def test_full_fine_tuning_of_a_quantized_base_is_refused(folder):
    with pytest.raises(EngineError, match=r'cannot train nf4 weights.*trainer\.method = "lora"'):
        trainer_of(folder, "nf4", method="full")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "one", "bare", "row", "block", "transposed"])
def test_a_gpu_dequantizes_to_the_same_numbers(kind, dtype):
    for shape in [(40, 64), (130, 300), (256, 128)]:
        if kind == "nf4":
            layer = quantized(random(*shape, dtype=dtype), "nf4")
        else:
            layer = fp8_layer(shape, "row" if kind == "transposed" else kind, dtype, kind == "transposed")
        expected = layer.dequantized(dtype)
        found = layer.to("cuda").dequantized(dtype).cpu()
        if kind == "nf4":  # bitsandbytes rounds to float16 on a CPU in another place: one unit
            assert torch.allclose(found, expected, rtol=torch.finfo(dtype).eps, atol=0), shape
        else:
            assert torch.equal(found, expected), shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "one", "bare", "row", "block", "transposed"])
def test_triton_gives_the_same_bits_as_the_reference(kind, dtype):
    for shape in [(9, 41), (130, 300), (256, 128)]:
        if kind == "nf4":
            layer = quantized(random(*shape, dtype=dtype), "nf4")
        else:
            layer = fp8_layer(shape, "row" if kind == "transposed" else kind, dtype, kind == "transposed")
        layer = layer.to("cuda")
        expected = layer.dequantized(torch.float32 if dtype == torch.float64 else dtype)
        use_kernels(layer, "triton")
        assert torch.equal(layer.dequantized(dtype), expected.to(dtype)), shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_nf4_on_a_gpu_equals_the_layer_of_bitsandbytes(dtype, tokens):
    dense = nn.Linear(256, 512, bias=False, dtype=dtype)
    theirs = bitsandbytes.nn.Linear4bit(256, 512, bias=False, compute_dtype=dtype, compress_statistics=False,
                                        quant_type="nf4")  # fmt: skip
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cuda")
    ours = quantized(dense.weight.detach().cuda(), "nf4")
    assert torch.equal(ours.weight.flatten(), theirs.weight.data.flatten())
    x, y = (random(tokens, 256, seed=6, dtype=dtype).cuda().requires_grad_() for _ in range(2))
    one, two = ours(x), theirs(y)
    assert (one - two).float().norm() <= 1e-2 * two.float().norm()  # few tokens take bitsandbytes' own kernel
    one.sum().backward()
    two.sum().backward()
    assert (x.grad - y.grad).float().norm() <= 1e-2 * y.grad.float().norm()
