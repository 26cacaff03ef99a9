"""vLLM's CPU build against transformers and peft: what the engine holds beside vLLM's own model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.rl.config import ModelConfig, RolloutConfig
from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import checksum, fingerprint
from posttrain.rl.sharing import opened, share
from posttrain.rl.types import Adapter, Prompt, SamplingParams, SharedAdapter
from posttrain.rollout.vllm_engine import VllmEngine
from tests.rollout.conftest import (
    LINEAR_LAYERS,
    LORA,
    PADDED_VOCABULARY,
    adapter_tensors,
    make_adapter,
    reference_model,
    save_tiny_model,
)
from tests.rollout.test_engine_contract import PROMPTS, worst

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None or torch.cuda.is_available(), reason="needs vLLM's CPU build"
    ),
]
TOLERANCE = 5e-5
LONG = [Prompt("long", "", {}, tuple(range(2, 30)) * 2)]
"""More than one block of the prefix cache, whose blocks hold 16 tokens or more."""


def start(folder: Path, backend: str, **changes: Any) -> VllmEngine:
    rollout = RolloutConfig(max_model_len=96, lora_backend=backend, enforce_eager=True)  # type: ignore[arg-type]
    defaults = {"lora_rank": LORA["r"], "kv_cache_bytes": 2**24, "sequences": 16, "in_process": True}
    return VllmEngine(folder, ModelConfig(name=str(folder)), rollout, **{**defaults, **changes})


@pytest.fixture(scope="module", params=["dense", "slots"])
def engine(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[VllmEngine]:
    engine = start(tiny_model, request.param)
    yield engine
    engine.close()


def only(adapter: Adapter, endings: list[str]) -> Adapter:
    """The adapter with B zero everywhere else."""
    tensors = {
        name: tensor if ".lora_A." in name or name.split(".")[-3] in endings else torch.zeros_like(tensor)
        for name, tensor in adapter.tensors.items()
    }
    return Adapter(adapter.policy_version, "lora", tensors, adapter.config)


@pytest.mark.parametrize("endings", [[layer] for layer in LINEAR_LAYERS] + [LINEAR_LAYERS], ids="+".join)
def test_each_projection_alone_changes_the_logprobs_as_peft_says(
    engine: VllmEngine, tiny_model: Path, endings: list[str]
) -> None:
    adapter = only(make_adapter(tiny_model, 1, seed=3, scale=0.5), endings)
    assert engine.load_adapter(adapter) == fingerprint(adapter.tensors)
    groups = engine.generate(PROMPTS, 3, SamplingParams(max_tokens=12))
    assert worst(reference_model(tiny_model, adapter), groups) < TOLERANCE
    assert worst(reference_model(tiny_model), groups) > 100 * TOLERANCE


def test_a_cached_prefix_is_not_reused_under_the_next_adapter(engine: VllmEngine, tiny_model: Path) -> None:
    for seed in (1, 2, 1):
        adapter = make_adapter(tiny_model, seed, seed=seed)
        engine.load_adapter(adapter)
        tuned = reference_model(tiny_model, adapter)
        for _ in range(2):  # the second time the prompt comes from the cache
            group = engine.generate(LONG, 2, SamplingParams(max_tokens=8))
            assert logprob_error(tuned, group[0]) < TOLERANCE


def logprob_error(model: torch.nn.Module, completions: list[Any]) -> float:
    from tests.rollout.conftest import reference_logits

    errors = []
    for completion in completions:
        expected = reference_logits(model, LONG[0], completion).log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(completion.completion_ids)[:, None])[:, 0]
        errors.append((chosen - torch.tensor(completion.rollout_logprobs).double()).abs().max().item())
    return max(errors)


def shared(adapter: Adapter) -> SharedAdapter:
    """As a trainer publishes it: one buffer, alpha/rank folded into B."""
    scaling = adapter.config["lora_alpha"] / adapter.config["r"]
    layout, flat = [], []
    for name, tensor in adapter.tensors.items():
        layout.append((name, sum(part.numel() for part in flat), tuple(tensor.shape)))
        flat.append((tensor * (scaling if ".lora_B." in name else 1.0)).reshape(-1))
    buffer = torch.cat(flat)
    return SharedAdapter(adapter.policy_version, adapter.config, share(buffer), tuple(layout), checksum(buffer))


def test_an_adapter_in_a_shared_buffer_is_copied_out_of_it(engine: VllmEngine, tiny_model: Path) -> None:
    adapter = make_adapter(tiny_model, 7, seed=5)
    published = shared(adapter)
    assert engine.load_adapter(published) == published.fingerprint
    opened(published.buffer).zero_()  # the trainer writes its next version
    groups = engine.generate(PROMPTS, 2, SamplingParams(max_tokens=12))
    assert worst(reference_model(tiny_model, adapter), groups) < TOLERANCE
    assert {completion.policy_version for group in groups for completion in group} == {7}


def test_a_buffer_that_is_not_what_its_fingerprint_says_is_an_error(engine: VllmEngine, tiny_model: Path) -> None:
    published = shared(make_adapter(tiny_model, 7, seed=5))
    opened(published.buffer)[3] += 1
    with pytest.raises(EngineError, match="another adapter than it was given"):
        engine.load_adapter(published)


def refused(adapter: Adapter, how: str) -> Adapter:
    tensors, config = dict(adapter.tensors), dict(adapter.config)
    name = next(name for name in tensors if "layers.1" in name and "k_proj.lora_A" in name)
    if how == "missing module":
        del tensors[name], tensors[name.replace("lora_A", "lora_B")]
    elif how == "unknown module":
        tensors |= {name.replace("k_proj", "z_proj"): tensors[name]}
    elif how == "rank":
        config["r"], tensors = 3, {n: t[:3] if ".lora_A." in n else t[:, :3] for n, t in tensors.items()}
    elif how == "shape":
        tensors[name] = tensors[name][:, :-1]
    elif how == "dora":
        config["use_dora"] = True
    return Adapter(adapter.policy_version, "full" if how == "full" else "lora", tensors, config)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing module", r"missing base_model.model.model.layers.1.self_attn.k_proj.lora_A"),
        ("unknown module", "unknown to the engine .*z_proj"),
        ("rank", "the engine holds"),
        ("shape", r"\(4, 63\), the engine holds \(4, 64\)"),
        ("dora", "use_dora"),
        ("full", "LoRA adapters only"),
    ],
)
def test_refused_adapter_names_what_is_wrong_and_the_last_one_stays(
    engine: VllmEngine, tiny_model: Path, how: str, message: str
) -> None:
    adapter = make_adapter(tiny_model, 1, seed=1)
    engine.load_adapter(adapter)
    with pytest.raises(EngineError, match=message):
        engine.load_adapter(refused(make_adapter(tiny_model, 2, seed=2), how))
    groups = engine.generate(PROMPTS, 2, SamplingParams(max_tokens=12))
    assert worst(reference_model(tiny_model, adapter), groups) < TOLERANCE
    assert {completion.policy_version for group in groups for completion in group} == {1}


def test_short_rows_come_before_long_ones(engine: VllmEngine, tiny_model: Path) -> None:
    engine.load_adapter(make_adapter(tiny_model, 1, scale=0.0))
    room = engine._engine.model_config.max_model_len
    nearly_full = Prompt("short", "", {}, (7,) * (room - 2))
    stream = engine.stream([PROMPTS[0], nearly_full, PROMPTS[1]], 2, SamplingParams(max_tokens=60))
    index, group = next(stream)
    assert index == 1 and [len(completion.completion_ids) for completion in group] == [2, 2]
    assert engine._engine.has_unfinished_requests()
    stream.close()
    assert not engine._engine.has_unfinished_requests()


def test_the_cpu_build_shares_what_it_has_not_repacked(engine: VllmEngine, tiny_model: Path) -> None:
    model = reference_model(tiny_model)
    weights = engine.export_weights()
    expected = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.shape == tuple(expected[name].shape)
        if "proj" in name:
            assert "oneDNN" in str(weight.repacked)
        else:
            tensor = opened(weight.tensors["weight"])
            assert torch.equal(tensor, expected[name]) and checksum(tensor) == weight.checksums["weight"]
    assert (
        weights["model.layers.1.self_attn.v_proj.weight"].origin == "model.layers.1.self_attn.qkv_proj[96:128].weight"
    )


@pytest.mark.slow
def test_compiled_llama_with_biases_and_an_adapter_on_two_projections(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    config = LlamaConfig(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.15,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    wanted = ["q_proj", "up_proj"]
    rollout = RolloutConfig(max_model_len=96)
    engine = VllmEngine(
        tmp_path, ModelConfig(name=str(tmp_path)), rollout, lora_rank=4, lora_targets=wanted, kv_cache_bytes=2**24
    )
    try:
        every = adapter_tensors(tmp_path, seed=1, scale=0.5)
        tensors = {name: tensor for name, tensor in every.items() if name.split(".")[-3] in wanted}
        for scale in (1.0, -2.0):
            scaled = {name: tensor * (scale if ".lora_B." in name else 1) for name, tensor in tensors.items()}
            adapter = Adapter(1, "lora", scaled, {**LORA, "target_modules": wanted})
            engine.load_adapter(adapter)
            groups = engine.generate(PROMPTS, 3, SamplingParams(max_tokens=12))
            whole = Adapter(1, "lora", {n: scaled.get(n, torch.zeros_like(t)) for n, t in every.items()}, LORA)
            assert worst(reference_model(tmp_path, whole), groups) < TOLERANCE
            assert worst(reference_model(tmp_path), groups) > 100 * TOLERANCE
        exported = engine.export_weights()
        bias = opened(exported["model.layers.0.self_attn.k_proj.bias"].tensors["weight"])
        assert torch.equal(bias, model.model.layers[0].self_attn.k_proj.bias)
        head = opened(exported["lm_head.weight"].tensors["weight"])
        assert torch.equal(head, model.lm_head.weight)
    finally:
        engine.close()


def test_targets_that_no_layer_has_are_refused_before_vllm_starts(tiny_model: Path) -> None:
    with pytest.raises(EngineError, match="no linear layer"):
        start(tiny_model, "dense", lora_targets=["no_proj"])
