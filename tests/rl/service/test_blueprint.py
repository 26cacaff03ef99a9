"""What is handed to engine and trainer where they share a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from posttrain.rl.config import from_settings
from posttrain.rl.machine import GIB, Memory
from posttrain.rl.memory import estimate_memory, split
from posttrain.rl.service import blueprint
from posttrain.rl.service.blueprint import Blueprint, Room
from posttrain.rl.service.random_model import materialize

from .tiny_runs import settings

CARD = Memory("cuda", "card", 80 * GIB, 79 * GIB, (9, 0))


def pretend(monkeypatch, *, gpu: bool) -> None:
    """vLLM is installed; there is a GPU, or none."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "vllm" else found(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(blueprint, "available", lambda device, gpus: CARD)


def test_engine_and_trainer_get_their_shares_of_the_gpu(monkeypatch, tmp_path) -> None:
    config = from_settings(**settings(engine="vllm", kv_cache_gib=2.5))
    source = materialize(config.model, tmp_path / "model")
    pretend(monkeypatch, gpu=True)
    made = Blueprint.of(config, source)
    assert made.in_actors and made.engine_lends and not made.trainer_lends
    sampler, trainer = made.make_sampler(None), made.make_trainer({}, None)
    assert sampler.keywords["kv_cache_bytes"] == 2.5 * GIB and sampler.keywords["in_process"]
    assert sampler.args[0] == trainer.args[0] == source and trainer.keywords["shared"] == {}
    shares = split(config, CARD)
    assert trainer.keywords["memory_limit"] == shares.trainer < 79 * GIB
    assert made.peak_bytes == shares.needed.total < shares.budget
    assert sampler.keywords["sequences"] == shares.sequences
    assert sampler.args[2].max_model_len == config.max_model_len


@pytest.mark.parametrize(("short_of", "recomputed"), [(0, False), (1, True)])
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_the_trainer_is_told_whether_it_recomputes(monkeypatch, tmp_path, engine, short_of, recomputed) -> None:
    config = from_settings(**settings(engine=engine, group_size=64, max_tokens=2000))
    source = materialize(config.model, tmp_path / "model")
    pretend(monkeypatch, gpu=True)
    needed = estimate_memory(config, CARD)
    config = config.model_copy(update={"gpu_memory_gib": (needed.fixed + needed.activations - short_of) / GIB})
    made = Blueprint.of(config, source)
    assert made.make_trainer(None, None).args[2].activation_checkpointing is recomputed
    assert made.config.trainer.activation_checkpointing is recomputed


def test_a_run_never_claims_more_than_its_budget(monkeypatch, tmp_path) -> None:
    config = from_settings(**settings(engine="vllm", gpu_memory_gib=1.65, max_tokens=60_000, group_size=64))
    pretend(monkeypatch, gpu=True)
    made = Blueprint.of(config, materialize(config.model, tmp_path / "model"))
    assert made.peak_bytes == int(1.65 * GIB) < estimate_memory(config, CARD).total


def test_a_run_of_the_transformers_engine_claims_its_peak(monkeypatch, tmp_path) -> None:
    config = from_settings(**settings(engine="transformers"))
    pretend(monkeypatch, gpu=True)
    made = Blueprint.of(config, materialize(config.model, tmp_path / "model"))
    assert made.peak_bytes == estimate_memory(config, CARD).total and made.trainer_bytes is None
    monkeypatch.setattr(blueprint, "available", lambda device, gpus: Memory("cpu", "main memory", GIB, GIB))
    assert Blueprint.of(config, made.source).peak_bytes is None


def test_half_the_cache_where_it_is_vllms_half_the_sequences_else() -> None:
    cache, sequences = Room(3 * GIB, 64), Room(None, 64)
    assert cache.halved() == Room(3 * GIB // 2, 64) and cache.halved().describe() == "1.50 GiB of KV cache"
    assert sequences.halved() == Room(None, 32) and sequences.halved().describe() == "32 sequences at once"
    assert Room(None, 1).halved() == Room(None, 1)


@pytest.mark.parametrize(
    ("changes", "gpu", "in_actors", "trainer_lends"),
    [
        ({}, False, False, True),
        ({"method": "full"}, False, False, False),
        ({"placement": "ray"}, False, True, False),
        ({"gpus": 2}, False, True, False),
        ({"engine": "vllm", "placement": "embedded", "device": "cpu"}, True, False, False),
    ],
)
def test_where_they_live_and_who_owns_the_base(monkeypatch, tmp_path, changes, gpu, in_actors, trainer_lends) -> None:
    pretend(monkeypatch, gpu=gpu)
    made = Blueprint.of(from_settings(**settings(**changes)), str(tmp_path))
    assert (made.in_actors, made.trainer_lends, made.engine_lends) == (in_actors, trainer_lends, False)
