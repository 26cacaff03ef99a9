"""Activations in the byte model: by hand for a known shape, and to the byte against what our kernels' nodes keep."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from posttrain.kernels import reference
from posttrain.rl import activations
from posttrain.rl.architecture import meta_model
from posttrain.rl.config import LoraConfig, ModelConfig, TrainerConfig
from posttrain.rl.footprint import estimate_memory
from posttrain.trainer import lora
from posttrain.trainer.families import FAMILIES, Family
from posttrain.trainer.model import PackedModel, load_causal_lm
from tests.kernels.kernel_tests import DEVICE, run_interpreted, runs
from tests.rl.architectures import CPU, H200, QWEN3_4B, SMALL, configured
from tests.trainer.tiny import save_tiny

TOKENS = 16384
RECOMPUTED: dict[str, Any] = {"activation_checkpointing": True}
OFFLOADED = {**RECOMPUTED, "offload_activations": True}


def test_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_interpreted(__file__, at_least=6)


# Qwen3-4B in bfloat16, rank 16 beside seven matrices, on kernels
LAYER = 2 * (
    2560  # the layer's input
    + 2560  # its norm
    + 4096 + 1024  # q and k before their norms
    + 4096 + 1024 + 1024  # q, k, v
    + 4096  # what attention returns
    + 2560 + 2560  # the sum, and its norm
    + 9728 + 9728  # gate and up
    + 7 * 16  # x Aᵀ of every matrix
) + 4 * 32  # fmt: skip
"""And the logarithm of the sum of each head."""
WORKING = 2 * (9728 + 3 * 2560)
TILE = 4096 * 4 * (8192 + 2560)


@pytest.mark.parametrize(
    ("trainer", "device", "host"),
    [
        ({}, TOKENS * (36 * LAYER + WORKING), 0),
        (RECOMPUTED, TOKENS * (36 * 5120 + LAYER + WORKING), 0),
        (OFFLOADED, TOKENS * (2 * 5120 + LAYER + WORKING), TOKENS * 35 * 5120),
        ({"offload_activations": True}, TOKENS * (36 * LAYER + WORKING), 0),
    ],
)
def test_a_known_model_on_kernels_by_hand(trainer: dict[str, Any], device: int, host: int) -> None:
    assert LAYER == 90_464
    found = estimate_memory(configured(QWEN3_4B, rollout={"engine": "vllm"}, trainer=trainer), H200)
    assert found.activations == device + TILE
    assert found.pinned == host


def test_every_gpu_has_its_own_inputs_in_host_memory() -> None:
    one, two = (
        estimate_memory(configured(QWEN3_4B, rollout={"engine": "vllm"}, trainer=OFFLOADED, gpus=gpus), H200)
        for gpus in (1, 2)
    )
    assert (two.pinned, two.activations) == (2 * one.pinned, one.activations)


def test_without_kernels_a_layer_takes_more_and_on_a_cpu_there_is_nowhere_to_move_inputs_to() -> None:
    fused, plain = (
        estimate_memory(configured(QWEN3_4B, rollout={"engine": "vllm"}, trainer={"kernels": kernels}), H200)
        for kernels in ("triton", "reference")
    )
    assert 1.3 * fused.activations < plain.activations
    kept, offloaded = (estimate_memory(configured(SMALL, trainer=trainer), CPU) for trainer in (RECOMPUTED, OFFLOADED))
    assert kept.activations == offloaded.activations
    assert kept.pinned == offloaded.pinned == 0


@pytest.mark.parametrize(("kernels", "columns"), [("triton", 64 + 128), ("reference", 3 * 64)])
def test_a_small_vocabulary_is_one_tile(kernels: str, columns: int) -> None:
    """Twice the tokens, beyond the rows of one tile: all that is counted a token doubles, the tile stays."""
    rollout = {"engine": "transformers", "prompts_per_step": 64, "group_size": 8}
    one, two = (
        estimate_memory(
            configured(SMALL, rollout=rollout, trainer={"kernels": kernels, "micro_batch_tokens": tokens}), H200
        ).activations
        for tokens in (5000, 10000)
    )
    assert 2 * one - two == 4096 * 4 * columns


def test_what_runs_on_kernels_is_what_the_trainer_puts_on_them() -> None:
    whole = {name: family for name, family in FAMILIES.items() if family.parts == Family("").parts}
    names = {"gemma3": "gemma3_text"}
    assert sorted(activations.ON_KERNELS) == sorted(names.get(name, name) for name in whole)
    assert sorted(activations.SANDWICH) == [names.get(name, name) for name, family in whole.items() if family.sandwich]


def test_tiles_are_those_of_the_kernels() -> None:
    pytest.importorskip("triton")
    from posttrain.kernels import token_logprobs

    assert (activations.TILE_ROWS, activations.KERNEL_COLUMNS) == (token_logprobs.ROWS, token_logprobs.CHUNK)
    default = inspect.signature(reference.token_logprobs).parameters["chunk"].default
    assert default == activations.REFERENCE_COLUMNS


def kept(model: PackedModel, layers: int, tokens: int) -> int:
    """Bytes that the backward pass of the first ``layers`` holds, what the model itself holds left out."""
    ids, places = torch.arange(tokens, device=DEVICE) + 3, torch.arange(tokens, device=DEVICE)
    model.causal_lm.config.num_hidden_layers = layers
    storages: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model._run(ids, places, model._packing([tokens - 3, 3]))
    return sum(size for size, _ in storages.values())


def model_of(folder: Path, family: str, **changes: Any) -> PackedModel:
    save_tiny(folder, family, num_hidden_layers=3, **changes)
    device = torch.device(DEVICE)
    model = PackedModel(load_causal_lm(folder, ModelConfig(name=str(folder), dtype="float32"), device), device)
    lora.attach(model.causal_lm, LoraConfig(), seed=0)
    return model


@runs
@pytest.mark.parametrize("family", activations.ON_KERNELS)
def test_a_layer_keeps_what_the_model_says_to_the_byte(tmp_path: Path, family: str) -> None:
    """The third layer keeps exactly that."""
    from posttrain.trainer import fused

    changes: dict[str, Any] = {} if family == "qwen2" else {"head_dim": 16}
    if family == "gemma3_text":
        changes["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    model = model_of(tmp_path, family, **changes)
    fused._replace(model.backbone)
    model.kernels = "triton"
    shape = meta_model(ModelConfig(name=str(tmp_path)))
    assert kept(model, 3, 11) - kept(model, 2, 11) == 11 * activations._fused(TrainerConfig(), shape, 4).layer


@pytest.mark.parametrize("offload", [False, True])
def test_a_recomputed_layer_keeps_its_input_to_the_byte(tmp_path: Path, offload: bool) -> None:
    model = model_of(tmp_path, "qwen3")
    model.enable_checkpointing(offload=offload)
    last = kept(model, 3, 11)
    assert last - kept(model, 2, 11) == 11 * 32 * 4  # offloaded: the input of the third, which stays
    assert kept(model, 2, 11) - kept(model, 1, 11) == (0 if offload else 11 * 32 * 4)
