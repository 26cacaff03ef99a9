"""The memory estimate against models that are really built, and against known sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.rl import memory
from posttrain.rl.config import Config, build
from posttrain.rl.errors import ConfigError
from posttrain.rl.machine import GIB
from posttrain.rl.memory import RUNTIME, Memory, check_fits, estimate_memory, lora_parameters, meta_model

SMALL = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "vocab_size": 64,
}
QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GPU = Memory("cuda", "a GPU", 80 * GIB, 79 * GIB, (9, 0))
CPU = Memory("cpu", "main memory", 64 * GIB, 60 * GIB)


def configured(architecture: dict[str, Any], **changes: Any) -> Config:
    return build({"model": {"random": {"config": architecture}}, **changes})


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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_counts_equal_those_of_the_model_and_of_peft(kind: str, tied: bool, targets: str) -> None:
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = {**SMALL, "model_type": kind, "tie_word_embeddings": tied}
    if kind == "gpt2":
        small = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1}
        architecture = {"model_type": "gpt2", "tie_word_embeddings": tied, **small}
    modules = "all-linear" if targets == "all-linear" else (["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"])
    config = configured(architecture, trainer={"lora": {"rank": 4, "target_modules": modules}})
    real = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    on_meta = meta_model(config.model)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert sum(p.numel() for p in on_meta.parameters()) == sum(p.numel() for p in real.parameters())
    adapted = peft.get_peft_model(real, peft.LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
    assert lora_parameters(on_meta, config.trainer.lora) == adapted.get_nb_trainable_parameters()[0]


def test_the_vocabulary_of_a_random_model_follows_its_characters() -> None:
    architecture = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    config = build({"model": {"random": {"config": architecture, "characters": "0123456789+="}}})
    assert meta_model(config.model).config.vocab_size == 12 + 2  # an end and a padding token


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


def test_vllm_takes_its_share_of_the_gpu() -> None:
    config = configured(SMALL, rollout={"engine": "vllm", "gpu_memory_utilization": 0.25})
    estimate = estimate_memory(config, GPU)
    assert (estimate.sampler, estimate.kv_cache) == (20 * GIB, 0)


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
    held = apart.weights + apart.adapter + apart.gradients + apart.optimizer + RUNTIME
    assert apart.total == held + max(apart.activations, apart.kv_cache)
    assert together.total == held + apart.activations + apart.kv_cache


def test_a_model_that_fits_and_one_that_does_not() -> None:
    rollout = {"engine": "transformers", "max_tokens": 256}
    config = configured(QWEN3_4B, rollout=rollout, trainer={"activation_checkpointing": True})
    assert check_fits(config, GPU).total < GPU.free
    small = Memory("cuda", "a small GPU", 8 * GIB, 8 * GIB - 1, (7, 5))
    with pytest.raises(ConfigError) as caught:
        check_fits(config, small)
    message = str(caught.value)
    assert "\n" not in message
    assert "does not fit into the 8.00 GiB free of 8.00 GiB (a small GPU)" in message
    assert "4,022M parameters" in message and "weights 7.49 GiB" in message


@pytest.mark.parametrize(
    ("changes", "free", "remedy"),
    [
        ({"trainer": {"method": "full"}}, 24, 'trainer.method = "lora"'),
        ({}, 5, "smaller model"),
        ({"rollout": {"engine": "vllm", "gpu_memory_utilization": 0.9}}, 24, "gpu_memory_utilization"),
        ({"rollout": {"engine": "transformers", "max_tokens": 4096}}, 24, "activation_checkpointing"),
        (
            {
                "rollout": {"engine": "transformers", "max_tokens": 8192},
                "trainer": {"activation_checkpointing": True, "micro_batch_tokens": 2048},
            },
            24,
            "max_sequences",
        ),
    ],
)
def test_the_message_says_what_would_help(changes: dict[str, Any], free: int, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        check_fits(configured(QWEN3_4B, **changes), Memory("cuda", "GPU", 24 * GIB, free * GIB, (8, 6)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no folder ./nowhere"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("a/b/c", "there is no folder a/b/c"),
        ("{tmp}", "has no config.json"),
    ],
)
def test_unknown_models_are_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_fits(build({"model": name.format(tmp=tmp_path)}), CPU)


def test_a_hub_name_that_nobody_has(monkeypatch) -> None:
    import transformers

    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect\nlong advice")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ConfigError, match=r"owner/model is neither a local folder nor a model on the hub: We couldn't"):
        check_fits(build({"model": "owner/model"}), CPU)


def test_an_architecture_nobody_knows() -> None:
    with pytest.raises(ConfigError, match=r"^model\.random\.config: "):
        check_fits(configured({"model_type": "nonsense"}), CPU)
    with pytest.raises(ConfigError, match="cannot be built as a causal LM"):
        check_fits(configured({"model_type": "t5"}), CPU)


def test_target_modules_that_name_no_layer() -> None:
    config = configured(SMALL, trainer={"lora": {"target_modules": ["qproj"]}})
    with pytest.raises(ConfigError, match=r"\['qproj'\] names no layer; it has: down_proj, gate_proj"):
        check_fits(config, CPU)


def test_a_quantized_checkpoint_takes_what_its_files_take(tmp_path: Path) -> None:
    import json

    quantized = {**SMALL, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps({**quantized, "architectures": ["Qwen3ForCausalLM"]}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 12345)
    config = build({"model": str(tmp_path), "rollout": {"engine": "transformers"}})
    assert estimate_memory(config, GPU).weights == 12345
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 777}}))
    assert estimate_memory(config, GPU).weights == 777


def test_the_device_that_is_asked_for(monkeypatch) -> None:
    from posttrain.rl import machine

    gpu = machine.Gpu(0, "A", 24 * GIB, 20 * GIB, (8, 6), "1")
    monkeypatch.setattr(machine, "gpus", lambda: [gpu])
    assert memory.available("auto") == Memory("cuda", "A", 24 * GIB, 20 * GIB, (8, 6))
    found = memory.available("cpu")
    assert found is not None and found.kind == "cpu"
    monkeypatch.setattr(machine, "gpus", lambda: [])
    with pytest.raises(ConfigError, match="no GPU is visible"):
        memory.available("cuda")
