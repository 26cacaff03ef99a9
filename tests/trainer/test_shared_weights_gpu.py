"""Two processes and one GPU: an engine that holds the weights, a trainer that maps them and publishes to it."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.rl import algorithms
from posttrain.rl.config import ModelConfig, TrainerConfig
from posttrain.rl.errors import OutOfMemory
from posttrain.trainer.trainer import Trainer

from .tiny import gradients, packed, save_tiny, sequences, step_params, wake_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LENGTHS = [70, 3, 129, 64, 1, 33]
SIZES = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
MIB = 2**20


class EngineProcess:
    """``tiny_engine.py`` as a program of its own."""

    def __init__(self, folder, scheme):
        command = [sys.executable, str(Path(__file__).with_name("tiny_engine.py")), str(folder), scheme, "bfloat16"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.shared = pickle.load(self.process.stdout)

    def ask(self, question):
        pickle.dump(question, self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("qwen3"), **SIZES, head_dim=64, initializer_range=0.03)


@pytest.fixture(scope="module", params=["dense", "nf4", "fp8"])
def engine(request, folder):
    engine = EngineProcess(folder, request.param)
    engine.scheme = request.param
    yield engine
    engine.close()


def trainer_over(folder, shared=None, quantization="none", **options):
    model = ModelConfig(name=str(folder), dtype="bfloat16", quantization=quantization)
    return Trainer(folder, model, TrainerConfig(device="cuda"), seed=0, shared=shared, **options)


def gradient_of(trainer):
    wake_adapter(trainer)
    trainer.forward_backward([packed(sequences(LENGTHS))], algorithms.parse("grpo"))
    return torch.cat([gradient.flatten() for gradient in gradients(trainer).values()])


def memory():
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]


def test_a_trainer_over_the_engines_weights_takes_no_memory_for_them(folder, engine):
    trainer_over(folder, engine.shared).close()  # workspaces of libraries are there from now on
    allocated, free = memory()
    trainer = trainer_over(folder, engine.shared)
    report = trainer.storage_report()
    assert report and all(entry.shared for entry in report)
    base = sum(entry.bytes for entry in report)
    assert base > 12 * MIB
    own = sum(weight.nbytes for weight in trainer._weights.values())
    allocated_after, free_after = memory()
    assert allocated_after - allocated < own + MIB
    assert free - free_after < own + 0.5 * base
    segments = [(s["address"], s["address"] + s["total_size"]) for s in torch.cuda.memory_snapshot()]
    inside = [entry.name for entry in report if any(low <= entry.data_ptr < high for low, high in segments)]
    assert not inside, "allocated by this process"
    trainer.close()
    assert memory()[0] <= allocated + MIB


def test_gradient_equals_that_of_a_trainer_with_its_own_weights(folder, engine):
    private = trainer_over(folder, quantization="none" if engine.scheme == "dense" else engine.scheme)
    expected = gradient_of(private)
    private.close()
    trainer = trainer_over(folder, engine.shared)
    found = gradient_of(trainer)
    assert expected.norm() > 0 and found.dtype == torch.float32
    assert (found - expected).norm() < 1e-2 * expected.norm()
    trainer.close()


def test_training_and_publishing_reach_the_engine_and_leave_its_weights_alone(folder, engine):
    before = engine.ask(None)
    trainer = trainer_over(folder, engine.shared)
    base = trainer.checksum()
    seen = []
    for version in range(3):
        published = trainer.publish_adapter()
        fingerprint, tensors = engine.ask(published)
        assert published.policy_version == version and fingerprint == published.fingerprint
        for name, weight in trainer.export_adapter().tensors.items():
            expected = (weight * (2.0 if "lora_B" in name else 1.0)).bfloat16().flatten()  # alpha / rank = 32 / 16
            assert torch.equal(tensors[name], expected)
        seen.append(fingerprint)
        trainer.forward_backward([packed(sequences(LENGTHS))], algorithms.parse("grpo"))
        trainer.optim_step(step_params(1e-3))
    assert len(set(seen)) == 3
    assert engine.ask(None) == before and trainer.checksum() == base
    trainer.close()


def test_a_micro_batch_beyond_the_memory_limit_is_out_of_memory_and_a_smaller_one_goes_on(folder, engine):
    gc.collect()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 256 * MIB
    trainer = trainer_over(folder, engine.shared, memory_limit=limit)
    try:
        expected = gradient_of(trainer)
        with pytest.raises(OutOfMemory, match=r"a micro-batch of 65536 tokens"):
            trainer.forward_backward([packed(sequences([512] * 128))], algorithms.parse("grpo"))
        trainer.clear_gradients()
        figures = trainer.memory()
        assert figures["reserved_gib"] * 1024 <= limit / MIB
        assert 0 < figures["allocated_gib"] <= min(figures["reserved_gib"], figures["peak_memory_gib"])
        assert (gradient_of(trainer) - expected).norm() < 1e-2 * expected.norm()
        trainer.release_memory()
        assert trainer.memory()["reserved_gib"] <= figures["reserved_gib"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        trainer.close()
