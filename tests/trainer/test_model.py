"""Packed sequences against one sequence at a time through the model's own forward pass, in float64."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.rl.config import ModelConfig
from posttrain.rl.errors import EngineError
from posttrain.trainer.model import PackedModel, load_causal_lm, resolve_device, resolve_dtype, resolve_kernels

from .tiny import FAMILIES, VOCABULARY, save_tiny

CPU = torch.device("cpu")
LENGTHS = [1, 9, 2, 14]


def load(folder, dtype="float64"):
    return load_causal_lm(folder, ModelConfig(name=str(folder), dtype=dtype), CPU)


def pack(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return ids, positions, cu_seqlens, positions.nonzero().squeeze(1)


def one_by_one(model, ids, temperature):
    """Logprobs and entropies of every token but the first, from the model's own logits."""
    logprobs, entropies = [], []
    for sequence in ids:
        table = (model(input_ids=sequence[None], use_cache=False).logits[0, :-1] / temperature).log_softmax(-1)
        logprobs.append(table.gather(1, sequence[1:, None]).squeeze(1))
        entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one(tmp_path, family):
    explicit = family in ("gemma2", "gpt_oss")  # their softcap and sinks are only in the eager implementation, which
    dtype = "float32" if family == "gpt_oss" else "float64"  # is float32 inside; grouped_mm has no float64
    own, shared = (load(save_tiny(tmp_path, family), dtype) for _ in range(2))
    own.eval()
    if explicit:
        own.set_attn_implementation("eager")
    packed = PackedModel(shared, CPU)
    assert packed.packs
    ids, positions, cu_seqlens, scored = pack(LENGTHS)
    ours = packed.logprobs(torch.cat(ids), positions, cu_seqlens, scored, temperature=0.7, entropy_gradient=True)
    theirs = one_by_one(own, ids, 0.7)
    tolerance = 2e-5 if explicit else 1e-10
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 1, len(scored)).to(ours[0].dtype)
    for logprobs, entropy in (ours, theirs):
        (weights * logprobs + weights.flip(0) * entropy).sum().backward()
    expected = dict(own.named_parameters())
    for name, parameter in shared.named_parameters():
        # Gemma's and Cohere's norms multiply by their weight in float32, so its gradient is summed in float32
        loose = "norm" in name and family in ("gemma3_text", "cohere")
        scale = expected[name].grad.abs().max().item()
        assert scale > 1e-6, name
        bound = (1e-6 if loose else 10 * tolerance) * max(scale, 1e-3)
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=bound, msg=f"{name} {scale}")


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_sliding_window_changes_what_is_seen(tmp_path, family):
    # Without its window the same weights give other logprobs: so the equality above is not vacuous.
    ids, positions, cu_seqlens, scored = pack([14])
    windows = [4, 400]
    values = []
    for window in windows:
        model = PackedModel(load(save_tiny(tmp_path / str(window), family, sliding_window=window)), CPU)
        values.append(model.logprobs(torch.cat(ids), positions, cu_seqlens, scored)[0])
    assert (values[0] - values[1]).abs().max() > 1e-3
    torch.testing.assert_close(values[0][:3], values[1][:3], rtol=1e-12, atol=1e-12)


STATEFUL = {
    "mamba": {"state_size": 4, "expand": 2, "time_step_rank": 4},
    "qwen3_next": {
        "head_dim": 16,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("family", STATEFUL)
def test_models_that_carry_state_run_one_sequence_at_a_time(tmp_path, caplog, family):
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        model = PackedModel(load(save_tiny(tmp_path, family, **STATEFUL[family]), "float32"), CPU)
    assert not model.packs and "one at a time" in caplog.text
    ids, positions, cu_seqlens, scored = pack([5, 7])
    with torch.no_grad():
        ours = model.logprobs(torch.cat(ids), positions, cu_seqlens, scored)[0]
        theirs = one_by_one(model.causal_lm, ids, 1.0)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dynamic_rope_is_not_packed_beyond_its_first_length(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 8}
    folder = save_tiny(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=8)
    model, own = PackedModel(load(folder), CPU), load(folder)
    own.eval()
    ids, positions, cu_seqlens, scored = pack([30, 5])
    ours = model.logprobs(torch.cat(ids), positions, cu_seqlens, scored)[0]
    torch.testing.assert_close(ours, one_by_one(own, ids, 1.0)[0], rtol=1e-9, atol=1e-9)


def test_an_unknown_change_to_the_logits_is_refused(tmp_path):
    model = load(save_tiny(tmp_path, "granite"))
    model.config.logits_scaling = 3.0
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(EngineError, match="differ from the model's own"):
        PackedModel(model, CPU)


def test_auto_dtype_and_device():
    assert resolve_dtype("auto", CPU) is torch.float32
    assert resolve_dtype("bfloat16", CPU) is torch.bfloat16
    assert resolve_device("cpu") == CPU
    if not torch.cuda.is_available():
        assert resolve_device("auto") == CPU
        with pytest.raises(EngineError, match="no GPU"):
            resolve_device("cuda")


def test_kernels_follow_the_device(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve_kernels("auto", CPU) == resolve_kernels("reference", CPU) == "reference"
    with pytest.raises(EngineError, match=r"kernels = triton, but Triton does not run on cpu.*use auto"):
        resolve_kernels("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_kernels("auto", CPU) == resolve_kernels("triton", CPU) == "triton"
    assert resolve_kernels("reference", CPU) == "reference"


def test_a_missing_model_is_one_clear_error(tmp_path):
    with pytest.raises(EngineError, match="cannot load"):
        load(tmp_path / "nothing")


def test_a_model_without_head_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=8, hidden_size=8,
        intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))  # fmt: skip
    model.lm_head = None
    with pytest.raises(EngineError, match="no output head"):
        PackedModel(model, CPU)
