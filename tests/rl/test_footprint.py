"""The byte model: by hand for known shapes, and against what autograd and bitsandbytes really keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.rl.architecture import meta_model
from posttrain.rl.config import build
from posttrain.rl.errors import ConfigError
from posttrain.rl.footprint import (
    BESIDE,
    NCCL,
    RUNTIME,
    capture_sizes,
    estimate_memory,
    kv_bytes_per_token,
    uses_vllm,
)
from posttrain.rl.machine import GIB, MIB, Memory
from tests.rl.architectures import CPU, GPU, H200, QWEN3_4B, SMALL, configured


def test_parameters_of_a_known_model_are_exact() -> None:
    """Qwen3-4B: 4,022,468,096 parameters as published; by hand per layer, plus the embedding and the last norm."""
    layer = 2560 * (4096 + 1024 + 1024) + 4096 * 2560 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    assert 36 * layer + 151936 * 2560 + 2560 == 4_022_468_096
    estimate = estimate_memory(configured(QWEN3_4B, rollout={"engine": "transformers"}), GPU)
    assert estimate.parameters == 4_022_468_096
    assert estimate.weights == 2 * 4_022_468_096
    # rank 16 beside q, k, v, o, gate, up, down
    per_layer = 16 * (2560 + 4096 + 2 * (2560 + 1024) + 4096 + 2560 + 3 * (2560 + 9728))
    assert estimate.trainable == 36 * per_layer == 33_030_144
    assert estimate.adapter == estimate.gradients == 4 * 33_030_144
    assert estimate.optimizer == 8 * 33_030_144


def kept_by_autograd(architecture: dict[str, Any], tokens: int, *, checkpointing: bool) -> int:
    """Bytes that the backward pass of a LoRA model's backbone holds, parameters left out."""
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # sdpa: like the trainer's own attention it keeps no scores
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture), attn_implementation="sdpa")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
        adapted.train()
    parameters = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted.base_model.model.model(input_ids=torch.randint(0, 64, (1, tokens)))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3_text"])
def test_activations_are_close_to_what_autograd_keeps(kind: str) -> None:
    layers, tokens = 6, 256
    architecture = {**SMALL, "model_type": kind, "num_hidden_layers": layers}
    rollout = {"prompts_per_step": 1, "group_size": 2, "max_tokens": 128}
    tile = 3 * tokens * 64 * 4

    def estimate(checkpointing: bool) -> int:
        config = configured(architecture, rollout=rollout, trainer={"activation_checkpointing": checkpointing})
        return estimate_memory(config, CPU, longest_prompt=0).activations - tile

    whole = kept_by_autograd(architecture, tokens, checkpointing=False)
    assert 1.0 < estimate(False) / whole < 1.3
    # with checkpointing one layer is whole again while its backward pass runs
    peak = kept_by_autograd(architecture, tokens, checkpointing=True) + whole / layers
    assert peak < whole / 2
    assert 1.0 < estimate(True) / peak < 1.5


@pytest.mark.parametrize(
    ("changes", "weights", "sampler", "adapter", "gradients", "optimizer"),
    [
        ({}, 2, 0, 0, 0, 0),
        ({"placement": "ray"}, 2, 2, 0, 0, 0),
        ({"model": {"dtype": "float32"}}, 4, 0, 0, 0, 0),
        ({"trainer": {"method": "full"}}, 2, 2, 4, 4, 8),
        ({"trainer": {"method": "full", "optimizer": "adamw_8bit"}}, 2, 2, 4, 4, 2),
        ({"trainer": {"method": "full"}, "model": {"dtype": "float32"}}, 4, 4, 0, 4, 8),
        ({"trainer": {"method": "full"}, "model": {"dtype": "float64"}}, 8, 8, 0, 8, 16),
    ],
)
def test_bytes_a_parameter(
    changes: dict[str, Any], weights: int, sampler: int, adapter: int, gradients: int, optimizer: int
) -> None:
    model = {"random": {"config": SMALL}, **changes.get("model", {})}
    config = build({"rollout": {"engine": "transformers"}, **changes, "model": model})
    estimate = estimate_memory(config, GPU)
    assert (estimate.weights, estimate.sampler) == (weights * estimate.parameters, sampler * estimate.parameters)
    if config.trainer.method == "full":
        assert estimate.trainable == estimate.parameters
        assert estimate.adapter == adapter * estimate.parameters
        assert estimate.gradients == gradients * estimate.parameters
        assert estimate.optimizer == optimizer * estimate.parameters


def test_automatic_dtype_is_four_bytes_on_a_cpu() -> None:
    estimate = estimate_memory(configured(SMALL), CPU)
    assert estimate.weights == 4 * estimate.parameters


def test_kv_cache_by_hand_and_the_longest_prompt_when_it_is_known() -> None:
    rollout = {"engine": "transformers", "prompts_per_step": 4, "group_size": 4, "max_tokens": 100, "max_sequences": 8}
    config = configured(SMALL, rollout=rollout, data={"max_prompt_tokens": 1000})
    a_token = 2 * 3 * 2 * 32 * 2  # keys and values, layers, heads, width, bytes
    logits = 8 * 64 * 4
    assert estimate_memory(config, GPU).kv_cache == 8 * 1100 * a_token + logits
    assert estimate_memory(config, GPU, longest_prompt=20).kv_cache == 8 * 120 * a_token + logits


def test_the_peak_counts_what_is_there_at_once() -> None:
    config = configured(SMALL, rollout={"engine": "transformers"})
    apart = estimate_memory(config, GPU)
    together = estimate_memory(configured(SMALL, rollout={"engine": "transformers", "max_staleness": 1}), GPU)
    held = apart.weights + apart.adapter + apart.gradients + apart.optimizer + RUNTIME + BESIDE
    assert apart.total == held + max(apart.activations, apart.kv_cache)
    assert together.total == held + apart.activations + apart.kv_cache


def test_a_quantized_checkpoint_takes_what_its_files_take(tmp_path: Path) -> None:
    import json

    quantized = {**SMALL, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps({**quantized, "architectures": ["Qwen3ForCausalLM"]}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 12345)
    config = build({"model": str(tmp_path), "rollout": {"engine": "transformers"}})
    assert estimate_memory(config, GPU).weights == 12345
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 777}}))
    assert estimate_memory(config, GPU).weights == 777


LINEAR = 36 * (2560 * (4096 + 1024 + 1024) + 4096 * 2560 + 3 * 2560 * 9728)
DENSE = 151936 * 2560 + 2560 + 36 * (2 * 2560 + 2 * 128)
"""Qwen3-4B: its linear layers, and its embedding and norms."""


@pytest.mark.parametrize(
    ("quantization", "weights"),
    [
        ("none", 8_044_936_192),
        # half a byte each and a float32 for every 64; a code book of 64 bytes in each of 252 layers; the rest in bf16
        ("nf4", 1_816_657_920 + 227_082_240 + 252 * 64 + 2 * 389_152_256),
        ("fp8", 3_633_315_840 + 252 * 4 + 2 * 389_152_256),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_weights_of_a_known_model_by_hand(quantization: str, weights: int, engine: str) -> None:
    assert (LINEAR, DENSE) == (3_633_315_840, 389_152_256)
    config = build(
        {"model": {"random": {"config": QWEN3_4B}, "quantization": quantization}, "rollout": {"engine": engine}}
    )
    assert estimate_memory(config, GPU).weights == weights


def test_nf4_takes_what_bitsandbytes_makes_of_a_model() -> None:
    import torch

    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL), dtype=torch.bfloat16)
    held = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
            packed, state = bitsandbytes.functional.quantize_4bit(layer.weight.data, quant_type="nf4", blocksize=64)
            assert not state.nested
            held[layer.weight.data_ptr()] = packed.nbytes + state.absmax.nbytes + state.code.nbytes
    config = build(
        {"model": {"random": {"config": SMALL}, "quantization": "nf4"}, "rollout": {"engine": "transformers"}}
    )
    assert estimate_memory(config, GPU).weights == sum(held.values())


def test_kv_cache_of_vllm_by_hand() -> None:
    """Qwen3-4B: 2 · 36 layers · 8 heads · 128 · 2 bytes a token; 2,560 tokens are 40 blocks of 64, and one is spare."""
    assert kv_bytes_per_token(meta_model(configured(QWEN3_4B).model).config, 2) == 147_456
    rollout = {"engine": "vllm", "prompts_per_step": 4, "group_size": 8, "max_tokens": 512}
    estimate = estimate_memory(configured(QWEN3_4B, rollout=rollout), H200)
    assert estimate.kv_least == 41 * 64 * 147_456 == 386_924_544
    assert (estimate.sequences, estimate.kv_cache) == (32, 32 * 386_924_544)
    odd = estimate_memory(configured(QWEN3_4B, rollout={**rollout, "max_tokens": 513}), H200)
    assert odd.kv_least == 42 * 64 * 147_456


@pytest.mark.parametrize(
    ("evaluation", "memory", "sequences"),
    [
        ({}, H200, 32),
        ({"every": 10, "max_prompts": 20, "samples": 4}, H200, 80),
        ({"every": 0, "max_prompts": 20, "samples": 4}, H200, 32),
        ({"every": 10, "max_prompts": 5000, "samples": 4}, H200, 1024),
        ({"every": 10, "max_prompts": 5000, "samples": 4}, Memory("cuda", "Tesla T4", 15 * GIB, 15 * GIB, (7, 5)), 256),
        ({"every": 10, "max_prompts": 5000, "samples": 4}, Memory("cuda", "NVIDIA A100", 80 * GIB, 80 * GIB), 256),
    ],
)
def test_sequences_at_once_are_those_of_a_step_or_an_evaluation(
    evaluation: dict[str, int], memory: Memory, sequences: int
) -> None:
    rollout = {"engine": "vllm", "prompts_per_step": 4, "group_size": 8}
    config = configured(QWEN3_4B, rollout=rollout, evaluation=evaluation, data={"eval_rows": 1})
    assert estimate_memory(config, memory).sequences == sequences


@pytest.mark.parametrize(
    ("gpus", "engine", "evaluation", "sequences"),
    [
        (1, "vllm", {}, 10 * 8),
        (2, "vllm", {}, 5 * 8),
        (3, "vllm", {}, 4 * 8),  # prompts are shared 4, 3, 3
        (3, "vllm", {"every": 10, "max_prompts": 50, "samples": 4}, 17 * 4),
        (16, "vllm", {}, 8),
        (3, "transformers", {}, 4 * 8),
    ],
)
def test_each_of_several_engines_decodes_its_share(
    gpus: int, engine: str, evaluation: dict[str, int], sequences: int
) -> None:
    rollout = {"engine": engine, "prompts_per_step": 10, "group_size": 8, "max_tokens": 512, "max_sequences": 512}
    config = configured(QWEN3_4B, rollout=rollout, evaluation=evaluation, data={"eval_rows": 1}, gpus=gpus)
    estimate = estimate_memory(config, H200)
    assert estimate.sequences == sequences
    if engine == "vllm":
        assert estimate.kv_cache == sequences * 386_924_544


@pytest.mark.parametrize(
    ("gpus", "engine", "memory", "runtime"),
    [
        (1, "vllm", H200, RUNTIME + BESIDE),
        (2, "vllm", H200, RUNTIME + BESIDE + NCCL),  # vLLM's own process counts as the engine's
        (2, "transformers", H200, 2 * RUNTIME + BESIDE + NCCL),
        (2, "transformers", CPU, 2 * RUNTIME),
    ],
)
def test_what_the_processes_of_a_pair_take(gpus: int, engine: str, memory: Memory, runtime: int) -> None:
    config = configured(SMALL, rollout={"engine": engine}, gpus=gpus)
    assert estimate_memory(config, memory).runtime == runtime


def test_a_given_kv_cache_is_what_there_is_and_must_hold_a_sequence() -> None:
    config = configured(QWEN3_4B, rollout={"engine": "vllm", "kv_cache_gib": 2.5})
    estimate = estimate_memory(config, H200)
    assert estimate.kv_cache == estimate.kv_least == 2_684_354_560
    with pytest.raises(
        ConfigError, match=r"kv_cache_gib = 0\.25 holds no sequence of 2560 tokens, which takes 0\.36 GiB"
    ):
        estimate_memory(configured(QWEN3_4B, rollout={"engine": "vllm", "kv_cache_gib": 0.25}), H200)


def test_what_vllm_takes_beside_weights_and_cache_by_hand() -> None:
    rollout = {"engine": "vllm", "prompts_per_step": 8, "group_size": 8}
    pass_ = 8192 * 3 * (2560 + 9728) * 2  # more than the sampler's 64 rows of logits
    lora = 33_030_144 * 2
    estimate = estimate_memory(configured(QWEN3_4B, rollout=rollout), H200)
    graphs = 11 * 36 * 5 * MIB // 8  # batches of 1, 2, 4, 8, 16, … 64
    assert estimate.engine == RUNTIME + graphs + pass_ + lora
    assert 1.36 * GIB < estimate.engine < 1.1 * 1.36 * GIB  # as measured on an H200
    assert (estimate.runtime, estimate.sampler) == (RUNTIME + BESIDE, 0)
    assert estimate.publication == lora
    eager = estimate_memory(configured(QWEN3_4B, rollout={**rollout, "enforce_eager": True}), H200)
    assert estimate.engine - eager.engine == graphs
    many = {"engine": "vllm", "prompts_per_step": 128, "group_size": 8, "enforce_eager": True}
    sampler = 1024 * 151936 * (2 + 4 * 4)
    assert sampler > pass_
    assert estimate_memory(configured(QWEN3_4B, rollout=many), H200).engine == RUNTIME + sampler + lora
    nf4 = build({"model": {"random": {"config": QWEN3_4B}, "quantization": "nf4"}, "rollout": rollout})
    assert estimate_memory(nf4, H200).engine - estimate.engine == 2560 * 9728 * 2  # one layer dequantized
    slots = configured(QWEN3_4B, rollout={**rollout, "lora_backend": "slots"}, trainer={"lora": {"rank": 24}})
    assert estimate_memory(slots, H200).engine - estimate.engine == lora  # rank 24 in slots of 32


@pytest.mark.parametrize("sequences", [1, 3, 8, 20, 64, 100, 256, 500, 1024])
def test_every_reachable_batch_has_a_graph_with_little_padding(sequences: int) -> None:
    sizes = capture_sizes(sequences)
    assert sizes[-1] == min(sequences, 512) and sizes == sorted(set(sizes))
    for batch in range(1, min(sequences, 512) + 1):
        size = min(size for size in sizes if size >= batch)
        assert size - batch <= max(7, batch // 4)
    assert len(sizes) <= 27


def test_vllm_on_a_cpu_holds_weights_of_its_own() -> None:
    estimate = estimate_memory(configured(SMALL, rollout={"engine": "vllm"}), CPU)
    assert estimate.sampler == estimate.weights == 4 * estimate.parameters
    assert (estimate.engine, estimate.publication, estimate.runtime) == (0, 0, 2 * RUNTIME)


@pytest.mark.parametrize(
    ("rollout", "trainer", "on_gpu", "expected"),
    [
        ({"engine": "vllm"}, {}, False, True),
        ({"engine": "transformers"}, {}, True, False),
        ({}, {}, True, True),
        ({}, {}, False, False),
        ({}, {"method": "full"}, True, False),
    ],
)
def test_which_engine_samples(monkeypatch, rollout: dict, trainer: dict, on_gpu: bool, expected: bool) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert uses_vllm(configured(SMALL, rollout=rollout, trainer=trainer), on_gpu) is expected


def test_scores_count_where_the_trainer_writes_them_out() -> None:
    """Gemma 2 bends its scores: bent scores and softmax in float32, weights in bfloat16, for each of 4 heads."""
    gemma = {**SMALL, "model_type": "gemma2"}
    rollout = {"engine": "transformers", "prompts_per_step": 1, "group_size": 2, "max_tokens": 128}
    changes: dict[str, Any] = {"rollout": rollout, "data": {"max_prompt_tokens": 128}}
    changes["trainer"] = {"kernels": "reference"}
    bent = estimate_memory(configured({**gemma, "attn_logit_softcapping": 50.0}, **changes), GPU)
    plain = {"model": {"random": {"config": {**SMALL, "model_type": "gemma3_text"}}}, **changes}
    tokens, length = 512, 256
    assert bent.activations - estimate_memory(build(plain), GPU).activations == 3 * tokens * 4 * length * (4 + 4 + 2)
