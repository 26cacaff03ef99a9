"""What vLLM is started with; needs no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain.rl.config import ModelConfig, RolloutConfig
from posttrain.rl.errors import EngineError
from posttrain.rollout.vllm_arguments import Architecture, Start, allowed_rank
from tests.rollout.conftest import LINEAR_LAYERS, PADDED_VOCABULARY, save_tiny_model

GIB = 2**30


@pytest.fixture(scope="module")
def architecture(tiny_model: Path) -> Architecture:
    return Architecture.of(str(tiny_model), ModelConfig(name=str(tiny_model)))


def start(architecture: Architecture, quantization: str = "none", backend: str = "auto", **changes: object) -> Start:
    model = ModelConfig(name="m", quantization=quantization)  # type: ignore[arg-type]
    rollout = RolloutConfig(max_model_len=4096, lora_backend=backend)  # type: ignore[arg-type]
    defaults = {"dtype": torch.bfloat16, "on_gpu": True, "architecture": architecture}
    return Start("m", model, rollout, **{**defaults, **changes})  # type: ignore[arg-type]


def test_a_tied_head_is_left_out_and_an_untied_one_is_a_weight_but_no_target(
    architecture: Architecture, tmp_path: Path
) -> None:
    assert "lm_head.weight" not in architecture.shapes
    untied = Architecture.of(str(save_tiny_model(tmp_path, tied=False)), ModelConfig(name="x"))
    assert untied.shapes["lm_head.weight"] == (PADDED_VOCABULARY, 64)
    for found in (architecture, untied):
        assert {name.rpartition(".")[2] for name in found.linear} == set(LINEAR_LAYERS)
        assert len(found.linear) == 14
        assert found.linear["model.layers.1.mlp.down_proj"] == (64, 128)


def test_targets_are_name_endings_as_in_peft(architecture: Architecture) -> None:
    assert architecture.targets("all-linear") == architecture.linear
    assert sorted(architecture.targets(["up_proj", "layers.1.self_attn.q_proj"])) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    with pytest.raises(EngineError, match="proj_up"):
        architecture.targets(["proj_up"])
    with pytest.raises(EngineError, match="p_proj"):
        architecture.targets(["p_proj"])  # the end of a word is not the end of a name


def test_arguments_follow_the_run(architecture: Architecture) -> None:
    args = start(architecture, "nf4", sequences=64, kv_cache_bytes=3 * GIB).arguments()
    assert (args["quantization"], args["dtype"]) == ("bitsandbytes", "bfloat16")
    assert (args["max_num_seqs"], args["kv_cache_memory_bytes"]) == (64, 3 * GIB)
    assert args["max_model_len"] == 128, "no longer than the model's positions"
    assert args["hf_overrides"] == {"head_dtype": "float32"}
    assert "hf_overrides" not in start(architecture, dtype=torch.float32).arguments()
    assert args["compilation_config"]["cudagraph_capture_sizes"][-1] == 64
    assert args["additional_config"] == {"posttrain_fp8_activations": False, "posttrain_nf4_product": True}
    assert "enable_lora" not in args
    assert start(architecture, "fp8").arguments()["quantization"] == "fp8"
    with pytest.raises(EngineError, match="16-bit"):
        start(architecture, "fp8", dtype=torch.float32).arguments()


def test_the_adapter_is_part_of_the_compile_cache_key(architecture: Architecture) -> None:
    targets = architecture.targets(["up_proj"])
    dense = start(architecture, lora_rank=4, lora_targets=targets).arguments()
    spec = dense["additional_config"]["posttrain_lora"]
    assert (spec["backend"], spec["rank"], spec["targets"]) == ("dense", 4, targets)
    assert "enable_lora" not in dense
    other = start(architecture, lora_rank=8, lora_targets=targets).arguments()
    assert other["additional_config"] != dense["additional_config"]
    slots = start(architecture, backend="slots", lora_rank=4, lora_targets=targets).arguments()
    assert slots["enable_lora"] and slots["lora_target_modules"] == ["up_proj"]


def test_slots_come_in_fixed_ranks() -> None:
    assert [allowed_rank(rank, (8, 16, 1, 32)) for rank in (1, 2, 8, 9, 32)] == [1, 8, 8, 16, 32]
    with pytest.raises(EngineError, match="dense"):
        allowed_rank(33, (8, 16, 1, 32))
