"""What fits, how a GPU is divided, and who is in the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from posttrain.rl import machine, memory
from posttrain.rl.config import build
from posttrain.rl.errors import ConfigError, EngineError
from posttrain.rl.footprint import BESIDE, RUNTIME
from posttrain.rl.machine import GIB, Gpu, Memory, Process
from posttrain.rl.memory import available, check_fits, estimate_memory, settled, split
from tests.rl.architectures import CPU, GPU, H200, QWEN3_4B, SMALL, configured

SHORT = {"engine": "vllm", "prompts_per_step": 4, "group_size": 8, "max_tokens": 512}
WIDE_CACHE = {"model": {"random": {"config": {**QWEN3_4B, "num_key_value_heads": 32}}}}
KEEPING = {"trainer": {"activation_checkpointing": False}}
RECOMPUTED = {"activation_checkpointing": True}
SAVING = {"trainer": {"activation_checkpointing": True, "micro_batch_tokens": 8192}}


@pytest.fixture(autouse=True)
def linux(monkeypatch) -> None:
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine.platform, "release", lambda: "6.1")
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)


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
        ({"rollout": {"engine": "vllm"}, "trainer": {"micro_batch_tokens": 2048}}, 8, 'model.quantization = "nf4"'),
        ({"rollout": {"engine": "vllm"}, **KEEPING}, 24, "activation_checkpointing"),
        ({"rollout": {"engine": "vllm", "kv_cache_gib": 23}, **SAVING}, 24, "lower rollout.kv_cache_gib"),
        ({"rollout": {"engine": "vllm", "max_tokens": 120_000}, **SAVING}, 24, "micro_batch_tokens or rollout.max_tok"),
        ({"rollout": {"engine": "vllm", "max_tokens": 40_000}, **SAVING, **WIDE_CACHE}, 24, "lower data.max_prompt"),
        ({"rollout": {"engine": "vllm", "max_staleness": 1, "kv_cache_gib": 12}, **SAVING}, 24, "max_staleness = 0"),
        ({"rollout": {"engine": "transformers", "max_tokens": 4096}, **KEEPING}, 24, "activation_checkpointing"),
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
    config = configured(QWEN3_4B, **changes)
    with pytest.raises(ConfigError, match=f"does not fit into .*{remedy}"):
        check_fits(config, Memory("cuda", "GPU", free * GIB, free * GIB, (8, 6)))


@pytest.mark.parametrize(("free", "fits"), [(2_936_012_800, True), (2_936_012_799, False)])
def test_offloaded_activations_must_fit_into_main_memory(monkeypatch, free: int, fits: bool) -> None:
    """Inputs of 35 of 36 layers, 16,384 tokens, 2,560 numbers of two bytes."""
    monkeypatch.setattr(machine, "memory", lambda: (64 * GIB, free))
    trainer = {"activation_checkpointing": True, "offload_activations": True}
    config = configured(QWEN3_4B, rollout={"engine": "transformers"}, trainer=trainer)
    if fits:
        assert check_fits(config, H200).pinned == free
        return
    with pytest.raises(ConfigError, match=r"takes 2\.73 GiB of main memory, 2\.73 GiB of 64\.00 GiB are free: lower"):
        check_fits(config, H200)


@pytest.mark.parametrize("staleness", [0, 1])
def test_activations_are_recomputed_where_they_do_not_fit_otherwise(staleness: int) -> None:
    """auto: at the last byte it changes; with sampling at the same time its cache counts, too."""
    rollout = {**SHORT, "max_staleness": staleness}
    keeping = estimate_memory(configured(QWEN3_4B, rollout=rollout, **KEEPING), H200)
    most = keeping.fixed + keeping.activations + staleness * keeping.kv_cache
    config = configured(QWEN3_4B, rollout=rollout)
    assert config.trainer.activation_checkpointing == "auto"

    def on(budget: int) -> Any:
        return config.model_copy(update={"gpu_memory_gib": budget / GIB})

    assert settled(on(most), H200).trainer.activation_checkpointing is False
    assert settled(on(most - 1), H200).trainer.activation_checkpointing is True
    enough, scarce = split(on(most), H200), split(on(most - 1), H200)
    assert enough.needed.activations == keeping.activations
    assert scarce.needed == estimate_memory(configured(QWEN3_4B, rollout=rollout, trainer=RECOMPUTED), H200)
    assert "for recomputed activations at most" in scarce.describe() and "for activations at" in enough.describe()


def test_what_is_said_about_recomputation_is_done_and_auto_means_no_beside_main_memory() -> None:
    for given in (True, False):
        config = configured(QWEN3_4B, trainer={"activation_checkpointing": given})
        for place in (H200, replace(H200, free=9 * GIB), CPU, None):
            assert settled(config, place) is config
    for place in (replace(CPU, free=GIB), None):
        assert settled(configured(QWEN3_4B), place).trainer.activation_checkpointing is False


# Qwen3-4B in bf16, 32 sequences of 2,560 tokens, LoRA rank 16
WEIGHTS = 8_044_936_192
ENGINE = RUNTIME + 7 * 36 * 5 * 2**17 + 8192 * 3 * (2560 + 9728) * 2 + 66_060_288
OUTSIDE = RUNTIME + BESIDE
"""Of the trainer's process, not in its allocator."""
TRAINING = 33_030_144 * (4 + 4 + 8 + 2)
"""Adapter, gradients, moments, and the buffer it is published in."""
CACHE, SEQUENCE = 32 * 386_924_544, 386_924_544


def test_a_gpu_is_divided_by_hand_when_sampling_and_training_take_turns() -> None:
    found = split(configured(QWEN3_4B, rollout=SHORT), H200)
    assert found.budget == 139 * GIB * 95 // 100
    assert (found.weights, found.engine, found.kv_cache, found.sequences) == (WEIGHTS, ENGINE, CACHE, 32)
    assert found.trainer == found.budget - WEIGHTS - ENGINE - OUTSIDE


def test_a_gpu_is_divided_by_hand_when_both_work_at_once() -> None:
    found = split(configured(QWEN3_4B, rollout={**SHORT, "max_staleness": 1}), H200)
    assert found.kv_cache == CACHE
    assert found.trainer == found.budget - WEIGHTS - ENGINE - OUTSIDE - CACHE


def test_the_kv_cache_has_what_the_trainer_does_not_always_hold() -> None:
    memory = Memory("cuda", "GPU", 24 * GIB, 20 * GIB, (8, 6))
    saving = {"activation_checkpointing": True, "micro_batch_tokens": 8192}
    config = configured(QWEN3_4B, rollout=SHORT, trainer=saving)
    found = split(config, memory)
    assert found.kv_cache == 20 * GIB * 95 // 100 - WEIGHTS - ENGINE - OUTSIDE - TRAINING < CACHE
    assert found.trainer == found.kv_cache + TRAINING
    given = split(configured(QWEN3_4B, rollout={**SHORT, "kv_cache_gib": 1.5}, trainer=saving), memory)
    assert (given.kv_cache, given.trainer) == (3 * 2**29, found.trainer)


def test_at_once_the_largest_micro_batch_goes_first_and_one_sequence_always_fits() -> None:
    keeping = {"micro_batch_tokens": 4096, "activation_checkpointing": False}
    config = configured(QWEN3_4B, rollout={**SHORT, "max_staleness": 1}, trainer=keeping)
    activations = estimate_memory(config, H200).activations
    fixed = WEIGHTS + ENGINE + OUTSIDE + TRAINING

    def given(budget: int) -> Any:
        return split(config.model_copy(update={"gpu_memory_gib": budget / GIB}), H200)

    plenty = given(fixed + activations + CACHE // 2)
    assert (plenty.kv_cache, plenty.trainer) == (CACHE // 2, TRAINING + activations)
    scarce = given(fixed + activations)
    assert (scarce.kv_cache, scarce.trainer) == (SEQUENCE, TRAINING + activations - SEQUENCE)
    least = fixed + activations // 2 + SEQUENCE
    assert given(least).trainer == TRAINING + activations // 2
    with pytest.raises(ConfigError, match=r"does not fit into the .* of gpu_memory_gib"):
        given(least - 2**20)


def test_the_parts_never_exceed_the_budget() -> None:
    for gibs in (11, 13, 17, 24, 40, 139):
        for staleness in (0, 1):
            config = configured(
                QWEN3_4B,
                rollout={**SHORT, "max_staleness": staleness},
                trainer={"micro_batch_tokens": 2560, "activation_checkpointing": True},
                gpu_memory_gib=gibs,
            )
            try:
                found = split(config, H200)
            except ConfigError:
                assert gibs < 17
                continue
            fixed = found.weights + found.engine + found.needed.runtime
            training = found.trainer if staleness else found.needed.training
            assert fixed + found.kv_cache + training <= found.budget
            assert fixed + found.trainer <= found.budget
            assert found.kv_cache >= SEQUENCE


def test_the_division_is_told_in_one_line() -> None:
    told = split(configured(QWEN3_4B, rollout=SHORT), H200).describe()
    assert told.startswith(
        "4,022M parameters, 33.03M trained, 132.05 GiB to share: weights 7.49 GiB, engine 1.40 GiB, "
    )
    assert "then in turn KV cache 11.53 GiB (32 sequences could use 11.53 GiB) and trainer 122.33 GiB" in told


# -- a GPU that is in use ------------------------------------------------------------------------------------------

BUSY = replace(H200, free=12 * GIB, processes=(Process(1234, "python3", 110 * GIB), Process(77, "", None)))


def test_a_run_on_a_busy_gpu_is_refused_with_the_numbers() -> None:
    keeping = {"micro_batch_tokens": 4096, "activation_checkpointing": False}
    config = configured(QWEN3_4B, rollout=SHORT, trainer=keeping)
    least = (WEIGHTS + ENGINE + OUTSIDE + TRAINING + estimate_memory(config, H200).activations // 2) / GIB
    with pytest.raises(ConfigError) as caught:
        check_fits(config, BUSY)
    message = str(caught.value)
    assert message.startswith(
        f"GPU 0 (NVIDIA H200): 12.0 of 140.0 GiB free, this run needs at least {least:.1f} (weights 7.49 GiB, "
    )
    assert message.endswith(
        "): process 1234 python3 holds 110.00 GiB, process 77 holds some of it; stop it, or lower its gpu_memory_gib"
    )
    with pytest.raises(ConfigError, match=r"another process holds the rest; stop it"):
        check_fits(config, replace(BUSY, processes=()))


def test_a_share_that_is_not_free_is_refused_though_less_would_do() -> None:
    config = configured(SMALL, rollout={**SHORT}, gpu_memory_gib=60)
    assert check_fits(config, H200).least < 12 * GIB
    with pytest.raises(
        ConfigError, match=r"this run may take 60\.0 \(gpu_memory_gib\): process 1234 .* or lower gpu_mem"
    ):
        check_fits(config, BUSY)
    with pytest.raises(ConfigError, match=r"gpu_memory_gib = 200, but NVIDIA H200 has 140\.00 GiB: lower it"):
        check_fits(configured(SMALL, rollout=SHORT, gpu_memory_gib=200), H200)
    assert check_fits(configured(SMALL, gpu_memory_gib=200), CPU).least < CPU.free  # main memory is not a GPU's


def test_two_runs_share_a_gpu_when_each_is_given_its_part() -> None:
    config = configured(QWEN3_4B, rollout=SHORT, trainer={"micro_batch_tokens": 4096}, gpu_memory_gib=65)
    first = split(config, H200)
    second = split(config, replace(H200, free=H200.free - first.budget))
    assert first == second and first.budget == 65 * GIB


def gpu(index: int, free: int | None, **changes: Any) -> Gpu:
    return Gpu(index, "H", None if free is None else 80 * GIB, free, (9, 0), "1", **changes)


def test_of_several_gpus_the_fullest_counts(monkeypatch) -> None:
    holder = (Process(5, "other", 70 * GIB),)
    found = [gpu(0, 79 * GIB), gpu(3, 9 * GIB, processes=holder), gpu(4, GIB)]
    monkeypatch.setattr(machine, "gpus", lambda: found)
    assert available("auto", 2) == Memory("cuda", "H", 80 * GIB, 9 * GIB, (9, 0), 3, holder)
    assert available("auto", 1) == Memory("cuda", "H", 80 * GIB, 79 * GIB, (9, 0), 0)
    config = configured(QWEN3_4B, rollout=SHORT, trainer={"micro_batch_tokens": 4096}, gpus=2)
    with pytest.raises(ConfigError, match=r"^GPU 3 \(H\): 9\.0 of 80\.0 GiB free.*process 5 other holds 70\.00 GiB"):
        check_fits(config)
    assert check_fits(config.model_copy(update={"gpus": 1})).least < 79 * GIB


def test_fewer_gpus_than_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [gpu(0, GIB)])
    with pytest.raises(ConfigError, match=r"^gpus = 2, but this machine shows 1: lower gpus$"):
        available("auto", 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match=r"gpus = 2, but this machine shows 1 \(CUDA_VISIBLE_DEVICES=0\)"):
        available("auto", 2)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # a cluster has GPUs elsewhere
    assert available("auto", 2) == Memory("cuda", "H", 80 * GIB, GIB, (9, 0), 0)


def test_a_driver_without_figures_tells_nothing(monkeypatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [gpu(0, None)])
    assert available() is None
    assert check_fits(configured(SMALL)).parameters > 0


# -- weights that cannot be shared ------------------------------------------------------------------------------------


def quantized(how: str, engine: str) -> Any:
    return build({"model": {"random": {"config": SMALL}, "quantization": how}, "rollout": {"engine": engine}})


@pytest.mark.parametrize(
    ("how", "engine", "capability", "refused"),
    [
        ("fp8", "vllm", (8, 6), True),
        ("fp8", "vllm", (8, 9), False),
        ("fp8", "vllm", None, False),
        ("fp8", "transformers", (7, 5), False),
        ("nf4", "vllm", (7, 5), False),
    ],
)
def test_fp8_needs_ada_where_vllm_multiplies(how: str, engine: str, capability: Any, refused: bool) -> None:
    memory = replace(GPU, capability=capability)
    if not refused:
        check_fits(quantized(how, engine), memory)
        return
    with pytest.raises(EngineError, match=r'capability 8\.9, a GPU has 8\.6: use "nf4", or rollout\.engine = "transf'):
        check_fits(quantized(how, engine), memory)


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_refused_where_weights_are_shared(monkeypatch, variable: str) -> None:
    monkeypatch.setenv(variable, "max_split_size_mb:64,expandable_segments:True")
    check_fits(quantized("none", "transformers"), GPU)
    with pytest.raises(EngineError, match=f"cannot map vLLM's weights: {variable} asks for expandable_segments"):
        check_fits(quantized("none", "vllm"), GPU)
    monkeypatch.setenv(variable, "expandable_segments:False")
    check_fits(quantized("none", "vllm"), GPU)


@pytest.mark.parametrize(("system", "release"), [("Windows", "10"), ("Linux", "5.15.167.4-microsoft-standard-WSL2")])
def test_weights_are_shared_on_linux_only(monkeypatch, system: str, release: str) -> None:
    monkeypatch.setattr(machine.platform, "system", lambda: system)
    monkeypatch.setattr(machine.platform, "release", lambda: release)
    with pytest.raises(EngineError, match="CUDA IPC needs Linux"):
        check_fits(quantized("none", "vllm"), GPU)


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
