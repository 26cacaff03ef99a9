"""A model on kernels computes what plain transformers and peft compute, and keeps their names."""

from __future__ import annotations

import logging
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from posttrain.rl.algorithms import GRPO
from posttrain.rl.config import LoraConfig, ModelConfig
from posttrain.rl.errors import EngineError
from posttrain.trainer import lora
from posttrain.trainer.model import PackedModel, load_causal_lm
from posttrain.trainer.quantized import QuantizedLinear, quantize_linears
from tests.kernels.kernel_tests import DEVICE, filled_with_nan, run_interpreted, runs

from .tiny import gradients, packed, save_tiny, sequences, trainer_of, wake_adapter

pytest.importorskip("triton")
from posttrain.trainer import fused

__all__ = ["filled_with_nan"]
RELATIVE = 1e-5 if DEVICE == "cpu" else 1e-4
ODD = {"intermediate_size": 41, "head_dim": 10}
ARCHITECTURES = {
    "llama": ODD | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "smollm2": ODD | {"tie_word_embeddings": True, "attention_bias": False, "num_key_value_heads": 1},
    "qwen2": {"intermediate_size": 41, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3},
    "qwen3": ODD | {"hidden_size": 33},
    "mistral": ODD,
    "gemma3_text": ODD | {"query_pre_attn_scalar": 7, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}},
    "phi3": ODD | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.6}},
}  # fmt: skip
GENERIC = {"smollm3": 2, "granite": 2, "gemma2": 2, "gpt_oss": 2, "cohere": 2, "olmo2": 2}
"""Families with parts that stay transformers' own."""
LENGTHS = (5, 9, 2)
IDS = torch.arange(sum(LENGTHS)) * 7 % 43 + 3
BOUNDS = torch.tensor([0, 5, 14, 16])
PLACES = torch.cat([torch.arange(length) for length in LENGTHS])
SCORED = torch.tensor([place for place in range(16) if place not in BOUNDS.tolist()])
WEIGHTS = torch.cos(torch.arange(len(SCORED), dtype=torch.float32))


def test_under_the_interpreter():
    run_interpreted(__file__, at_least=30)


def saved(folder, family, **changes):
    return save_tiny(folder, {"smollm2": "llama"}.get(family, family), **ARCHITECTURES.get(family, {}) | changes)


def waken(model):
    """Give B something to say."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in lora.weights(model).items():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))


def on_kernels(folder, quantization="none", **settings):
    """The trainer's model, its peft model and what was fused."""
    causal_lm = load_causal_lm(folder, ModelConfig(name=str(folder), dtype="float32"), torch.device(DEVICE))
    if quantization != "none":
        quantize_linears(causal_lm, quantization, torch.device(DEVICE))
    model = PackedModel(causal_lm, torch.device(DEVICE))
    adapted = lora.attach(causal_lm, LoraConfig(**settings), seed=0)
    report = fused.fuse(model)
    waken(adapted)
    return model, adapted, report


def plain(folder, like=None, **settings):
    """transformers and peft alone; ``like``: another model, whose quantized weights are taken over, dequantized."""
    causal_lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for name, module in like.named_modules() if like is not None else ():
        if isinstance(module, QuantizedLinear):
            weight = module.dequantized(torch.float32)
            causal_lm.get_submodule(name.removesuffix(".base_layer")).weight.data = weight
    adapted = lora.attach(causal_lm.to(DEVICE), LoraConfig(**settings), seed=0)
    waken(adapted)
    return adapted


def of_ours(model):
    """Hidden states and logprobs at ``SCORED``."""
    hidden = model.hidden(IDS.to(model.device), PLACES.to(model.device), BOUNDS, SCORED.to(model.device))
    logprobs, _ = model.logprobs(IDS.to(model.device), PLACES.to(model.device), BOUNDS, SCORED.to(model.device))
    return hidden, logprobs


def of_theirs(causal_lm):
    """The same, one sequence at a time and by way of logits."""
    hidden, logprobs = [], []
    for ids in IDS.to(DEVICE).split(LENGTHS):
        output = causal_lm(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        hidden.append(output.hidden_states[-1][0, :-1])
        logprobs.append(output.logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1))
    return torch.cat(hidden), torch.cat(logprobs)


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def assert_same(model, adapted, theirs, relative=RELATIVE):
    """Hidden states, logprobs, and gradients of every weight of the adapter."""
    found, expected = of_ours(model), of_theirs(theirs)
    assert distance(found[0], expected[0]) < relative
    assert distance(found[1], expected[1]) < relative
    for peft_model, (_, logprobs) in ((adapted, found), (theirs, expected)):
        (logprobs * WEIGHTS.to(DEVICE)).sum().backward()
        assert all(weight.grad is not None for weight in lora.weights(peft_model).values())
    expected_gradients = {name: weight.grad for name, weight in lora.weights(theirs).items()}
    assert lora.weights(adapted).keys() == expected_gradients.keys()
    for name, weight in lora.weights(adapted).items():
        assert distance(weight.grad, expected_gradients[name]) < relative, name


@runs
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_architecture_is_wholly_on_kernels_and_computes_the_same(tmp_path, filled_with_nan, family):
    model, adapted, report = on_kernels(saved(tmp_path, family))
    assert not report.left
    kinds = {name.removeprefix(model.backbone.layers[0].family.prefix): n for name, n in report.fused.items()}
    norms = {"qwen3": 9, "gemma3_text": 13}.get(family, 5)
    layers = 8 if family == "phi3" else 14
    assert kinds == {"DecoderLayer": 2, "Attention": 2, "MLP": 2, "RMSNorm": norms, "LoRA layers": layers}
    assert_same(model, adapted, plain(tmp_path))


@runs
@pytest.mark.parametrize("family", GENERIC)
def test_other_architectures_keep_what_is_not_known_and_compute_the_same(tmp_path, caplog, family):
    with caplog.at_level(logging.WARNING, "posttrain.trainer.fused"):
        model, adapted, report = on_kernels(saved(tmp_path, family))
    assert report.fused["LoRA layers"] > 0
    assert sum(count for name, count in report.left.items() if name.endswith("Attention")) == GENERIC[family]
    said = [record.message for record in caplog.records if "left to transformers: 2 " in record.message]
    assert len(said) == 1 and "DecoderLayer" in said[0]
    assert_same(model, adapted, plain(tmp_path))


@runs
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank": 3},
        {"target_modules": ["k_proj", "up_proj"], "rank": 1},
        {"target_modules": ["o_proj"], "rank": 5, "rank_stabilized": True},
        {"rank": 7, "rank_stabilized": True},
    ],
)
def test_some_layers_adapted_and_other_scalings(tmp_path, settings):
    model, adapted, report = on_kernels(saved(tmp_path, "qwen2"), **settings)
    assert not report.left
    assert_same(model, adapted, plain(tmp_path, **settings))


@runs
def test_adapter_on_part_of_a_fused_projection(tmp_path):
    settings = {"target_modules": ["gate_up_proj", "o_proj"], "rank": 3}
    model, adapted, _ = on_kernels(saved(tmp_path, "phi3"), **settings)
    assert_same(model, adapted, plain(tmp_path, **settings))


@runs
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_adapter_switched_off(tmp_path, family):
    model, adapted, _ = on_kernels(saved(tmp_path, family))
    with adapted.disable_adapter(), torch.no_grad():
        off = of_ours(model)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").to(DEVICE)
    with torch.no_grad():
        expected = of_theirs(base)
        assert distance(off[0], expected[0]) < RELATIVE and distance(off[1], expected[1]) < RELATIVE
        assert distance(of_ours(model)[0], expected[0]) > 1e-2


@runs
@pytest.mark.parametrize(("family", "scheme"), [("qwen3", "fp8"), ("phi3", "nf4")])
def test_quantized_base(tmp_path, family, scheme):
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    # bitsandbytes' code for the host mistakes absmax where a row is no whole number of blocks.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16} if scheme == "nf4" else {}
    model, adapted, report = on_kernels(saved(tmp_path, family, **sizes), quantization=scheme)
    assert not report.left
    assert any(isinstance(module, QuantizedLinear) for module in model.backbone.modules())
    assert_same(model, adapted, plain(tmp_path, like=model.causal_lm))


@runs
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_recomputed_layers_have_the_same_gradients_without_another_down_product(tmp_path, monkeypatch, family):
    model, adapted, _ = on_kernels(saved(tmp_path, family))
    calls, found = [], []
    whole = fused.lora_mlp
    monkeypatch.setattr(fused, "lora_mlp", lambda *a, output_used: calls.append(output_used) or whole(
        *a, output_used=output_used))  # fmt: skip
    for _ in range(2):
        (of_ours(model)[1] * WEIGHTS.to(DEVICE)).sum().backward()
        found.append([weight.grad for weight in lora.weights(adapted).values()])
        for weight in lora.weights(adapted).values():
            weight.grad = None
        model.enable_checkpointing()
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*found, strict=True))
    # Two layers, twice forward, in two rounds; then backward: Gemma norms what its MLP returns.
    again = family == "gemma3_text"
    assert calls == [True] * 8 + [again] * 2


@runs
@pytest.mark.parametrize("family", ["gemma3_text", "phi3"])
def test_every_weight_trained(tmp_path, family):
    folder = saved(tmp_path, family)
    causal_lm = load_causal_lm(folder, ModelConfig(name=str(folder), dtype="float32"), torch.device(DEVICE))
    model = PackedModel(causal_lm, torch.device(DEVICE))
    causal_lm.requires_grad_(True)
    report = fused.fuse(model)
    assert not report.left and "LoRA layers" not in report.fused
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(DEVICE)
    for found in (of_ours(model), of_theirs(theirs)):
        (found[1] * WEIGHTS.to(DEVICE)).sum().backward()
    expected = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in causal_lm.named_parameters():
        assert distance(weight.grad, expected[name]) < RELATIVE, name


@runs
def test_names_classes_and_files_stay(tmp_path):
    folder = saved(tmp_path / "model", "qwen3")
    model, adapted, _ = on_kernels(folder)
    theirs = plain(folder)
    assert list(adapted.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in adapted.named_modules()] == [name for name, _ in theirs.named_modules()]
    for ours, original in zip(adapted.modules(), theirs.modules(), strict=True):
        assert isinstance(ours, type(original))
    adapted.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(DEVICE)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    with torch.no_grad():
        assert distance(of_ours(model)[1], of_theirs(loaded)[1]) < RELATIVE


@runs
def test_trainer_on_kernels_and_without_agree(tmp_path):
    folder = saved(tmp_path, "qwen3")
    batch = packed(sequences([5, 3]))
    results = {}
    for kernels in ("triton", "reference"):
        trainer = trainer_of(folder, dtype="float32", device=DEVICE, kernels=kernels)
        wake_adapter(trainer)
        trainer.forward_backward([batch], GRPO())
        base, policy = trainer.score([batch], reference=True)[0].logprobs, trainer.score([batch])[0].logprobs
        results[kernels] = base, policy, gradients(trainer), sorted(trainer.base_weights()), trainer.checksum()
    ours, theirs = results["triton"], results["reference"]
    assert distance(ours[0], theirs[0]) < RELATIVE and distance(ours[1], theirs[1]) < RELATIVE
    assert distance(ours[0], ours[1]) > 1e-3
    assert ours[2].keys() == theirs[2].keys()
    assert all(distance(ours[2][name], theirs[2][name]) < 10 * RELATIVE for name in ours[2])
    assert ours[3:] == theirs[3:]


@runs
def test_layers_that_peft_does_more_with_stay_its_own(tmp_path):
    folder = saved(tmp_path, "llama")
    causal_lm = load_causal_lm(folder, ModelConfig(name=str(folder), dtype="float32"), torch.device(DEVICE))
    model = PackedModel(causal_lm, torch.device(DEVICE))
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "up_proj"], use_dora=True)
    adapted = peft.get_peft_model(causal_lm, settings).eval()
    waken(adapted)
    with torch.no_grad():
        expected = of_ours(model)
    report = fused.fuse(model)
    assert report.left == {"LoRA layers": 4} and report.fused["LlamaMLP"] == report.fused["LlamaAttention"] == 2
    with torch.no_grad():
        assert distance(of_ours(model)[0], expected[0]) < RELATIVE
    assert adapted.active_adapter == "default"


@runs
def test_a_model_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    folder = saved(tmp_path, "qwen3")
    wrong = replace(fused.FAMILIES["qwen3"], norm_offset=0.05)
    monkeypatch.setitem(fused.FAMILIES, "qwen3", wrong)
    with pytest.raises(EngineError, match=r"Qwen3ForCausalLM: on kernels its hidden states differ by .*kernels"):
        on_kernels(folder)


@runs
def test_an_adapter_left_out_is_noticed(tmp_path, monkeypatch):
    folder = saved(tmp_path, "qwen3")
    whole = fused._adapted
    monkeypatch.setattr(fused, "_adapted", lambda layer: whole(layer)._replace(a=None, b=None))
    with pytest.raises(EngineError, match="hidden states differ"):
        on_kernels(folder)


@runs
def test_probe_leaves_the_adapter_as_it_was(tmp_path):
    folder = saved(tmp_path, "qwen3")
    causal_lm = load_causal_lm(folder, ModelConfig(name=str(folder), dtype="float32"), torch.device(DEVICE))
    model = PackedModel(causal_lm, torch.device(DEVICE))
    adapted = lora.attach(causal_lm, LoraConfig(), seed=0)
    before = {name: weight.clone() for name, weight in lora.weights(adapted).items()}
    fused.fuse(model)
    assert all(torch.equal(weight, before[name]) for name, weight in lora.weights(adapted).items())
    assert not any(weight.any() for name, weight in before.items() if "lora_B" in name)


def test_float64_is_refused(tmp_path):
    folder = saved(tmp_path, "qwen3")
    causal_lm = load_causal_lm(folder, ModelConfig(name=str(folder), dtype="float64"), torch.device("cpu"))
    with pytest.raises(EngineError, match=r'trainer\.kernels = "reference"'):
        fused.fuse(PackedModel(causal_lm, torch.device("cpu")))


def test_only_transformers_own_classes_are_known():
    assert (
        fused._known(type("LlamaRMSNorm", (nn.Module,), {"__module__": "transformers_modules.modeling_llama"})) is None
    )
    own = type("LlamaRMSNorm", (nn.Module,), {"__module__": "transformers.models.llama.modeling_llama"})
    assert fused._known(own) is not None
