"""The engine contract on a GPU, with CUDA graphs and bfloat16, and what only a GPU has: sleep mode.

Prompts are shorter than a block of the prefix cache, so that a second run computes what the first did.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from posttrain.rl.config import ModelConfig, RolloutConfig
from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import fingerprint
from posttrain.rl.types import Adapter, Completion, Prompt, SamplingParams
from posttrain.rollout.vllm_engine import VllmEngine
from tests.rollout.conftest import (
    LORA,
    VOCABULARY,
    make_adapter,
    reference_logits,
    reference_model,
    save_tiny_model,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None or not torch.cuda.is_available(), reason="needs vLLM and an NVIDIA GPU"
    ),
]
PROMPTS = [
    Prompt("a", "", {}, (7, 8, 9)),
    Prompt("b", "", {}, (3, 30, 4, 31, 12, 13, 14, 15, 16, 17, 18)),
    Prompt("c", "", {}, (20,)),
]
GIB = 2**30
# A bfloat16 model rounds each activation to 8 bits; logits of size 10 carry errors of some hundredths.
MEAN_TOLERANCE = 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[VllmEngine]:
    rollout = RolloutConfig(max_model_len=128, gpu_memory_utilization=0.3)
    engine = VllmEngine(folder, ModelConfig(name=str(folder)), rollout, lora_rank=LORA["r"])
    yield engine
    engine.close()


@pytest.fixture
def engine(started: VllmEngine, folder: Path) -> VllmEngine:
    started.load_adapter(make_adapter(folder, 0, scale=0.0))
    return started


def ids(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.completion_ids for completion in group] for group in groups]


def differences(
    folder: Path, adapter: Adapter | None, groups: list[list[Completion]], temperature: float
) -> torch.Tensor:
    """Engine minus a full float32 forward pass, token by token."""
    model = reference_model(folder, adapter)
    found = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = (reference_logits(model, prompt, completion) / temperature).log_softmax(-1)
            chosen = expected.gather(1, torch.tensor(completion.completion_ids)[:, None])[:, 0]
            found.append(torch.tensor(completion.rollout_logprobs, dtype=torch.float64) - chosen)
    return torch.cat(found)


def test_same_seed_same_samples_and_each_sample_is_its_own(engine: VllmEngine) -> None:
    params = SamplingParams(max_tokens=24, seed=5)
    first = engine.generate(PROMPTS, 8, params)
    assert ids(engine.generate(PROMPTS, 8, params)) == ids(first)
    assert ids(engine.generate(PROMPTS, 8, SamplingParams(max_tokens=24, seed=6))) != ids(first)
    assert all(len(set(group)) == 8 for group in ids(first))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_full_forward_pass(engine: VllmEngine, folder: Path, temperature: float) -> None:
    groups = engine.generate(PROMPTS, 16, SamplingParams(max_tokens=24, temperature=temperature))
    error = differences(folder, None, groups, temperature)
    k3 = (torch.exp(-error) - 1 + error).mean().item()
    assert error.abs().mean().item() < MEAN_TOLERANCE
    assert k3 < 1e-2


def test_only_the_kept_tokens_are_drawn_and_renormalised(engine: VllmEngine) -> None:
    for _, group in zip(PROMPTS, engine.generate(PROMPTS, 4, SamplingParams(max_tokens=24, top_k=1))):
        assert len(set(ids([group])[0])) == 1
        assert group[0].rollout_logprobs == (0.0,) * 24
    two = engine.generate(PROMPTS[:1], 64, SamplingParams(max_tokens=1, top_k=2))[0]
    seen = {completion.completion_ids[0]: completion.rollout_logprobs[0] for completion in two}
    assert len(seen) == 2
    assert torch.tensor(list(seen.values())).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_padded_vocabulary_is_never_emitted(engine: VllmEngine) -> None:
    groups = engine.generate(PROMPTS, 64, SamplingParams(max_tokens=24, temperature=2.0))
    assert max(token for group in ids(groups) for row in group for token in row) < VOCABULARY


def test_stop_ids_and_budget(engine: VllmEngine) -> None:
    stops = {1, 5, 11, 30}
    groups = engine.generate(PROMPTS, 32, SamplingParams(max_tokens=12, stop_token_ids=tuple(stops)))
    reasons = set()
    for completion in (completion for group in groups for completion in group):
        *before, last = completion.completion_ids
        reasons.add(completion.finish_reason)
        assert not set(before) & stops
        assert (last in stops) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.completion_ids) == 12
        assert len(completion.rollout_logprobs) == len(completion.completion_ids)
    assert reasons == {"stop", "length"}


def test_each_published_adapter_is_the_one_in_use(engine: VllmEngine, folder: Path) -> None:
    greedy = SamplingParams(max_tokens=24, temperature=0.0)
    base = ids(engine.generate(PROMPTS, 1, greedy))
    outputs = []
    for version, seed in ((1, 1), (2, 2), (3, 1)):
        adapter = make_adapter(folder, version, seed=seed)
        assert engine.load_adapter(adapter) == fingerprint(adapter.tensors)
        outputs.append(ids(engine.generate(PROMPTS, 1, greedy)))
        sampled = engine.generate(PROMPTS, 16, SamplingParams(max_tokens=24))
        assert {completion.policy_version for group in sampled for completion in group} == {version}
        error = differences(folder, adapter, sampled, 1.0)
        assert error.abs().mean().item() < MEAN_TOLERANCE
        assert differences(folder, None, sampled, 1.0).abs().mean().item() > 10 * MEAN_TOLERANCE
    assert outputs[0] == outputs[2] != outputs[1]
    assert base not in outputs
    engine.load_adapter(make_adapter(folder, 4, scale=0.0))
    assert ids(engine.generate(PROMPTS, 1, greedy)) == base


def test_adapter_vllm_would_drop_in_silence_is_refused(engine: VllmEngine, folder: Path) -> None:
    engine.load_adapter(make_adapter(folder, 1))
    params = SamplingParams(max_tokens=24)
    before = ids(engine.generate(PROMPTS, 2, params))
    adapter = make_adapter(folder, 2, seed=2)
    renamed = {name.replace("layers.1", "layers.7"): tensor for name, tensor in adapter.tensors.items()}
    with pytest.raises(EngineError, match="does not hold"):
        engine.load_adapter(Adapter(2, "lora", renamed, LORA))
    assert ids(engine.generate(PROMPTS, 2, params)) == before


def test_sleep_gives_memory_back_and_waking_restores_the_policy(engine: VllmEngine, folder: Path) -> None:
    engine.load_adapter(make_adapter(folder, 1))
    params = SamplingParams(max_tokens=24)
    before = ids(engine.generate(PROMPTS, 8, params))
    free, total = torch.cuda.mem_get_info()
    engine.sleep()
    asleep, _ = torch.cuda.mem_get_info()
    assert asleep - free > 0.2 * total  # the cache alone takes almost all of the 30% it was given
    with pytest.raises(EngineError, match="asleep"):
        engine.generate(PROMPTS, 1, params)
    block = torch.empty(int(0.5 * (asleep - free)), dtype=torch.uint8, device="cuda")  # the trainer's turn
    del block
    torch.cuda.empty_cache()
    engine.wake()
    awake, _ = torch.cuda.mem_get_info()
    assert abs(awake - free) < GIB
    assert ids(engine.generate(PROMPTS, 8, params)) == before


def test_adapter_published_to_a_sleeping_engine_is_in_use_after_waking(engine: VllmEngine, folder: Path) -> None:
    greedy = SamplingParams(max_tokens=24, temperature=0.0)
    adapter = make_adapter(folder, 1, seed=4)
    engine.load_adapter(adapter)
    expected = ids(engine.generate(PROMPTS, 1, greedy))
    for version in (2, 3):
        engine.load_adapter(make_adapter(folder, version, scale=0.0))
        engine.sleep()
        assert engine.load_adapter(adapter) == fingerprint(adapter.tensors)
        free, _ = torch.cuda.mem_get_info()
        engine.wake()
        assert free - torch.cuda.mem_get_info()[0] > GIB  # the cache came back only now
        assert ids(engine.generate(PROMPTS, 1, greedy)) == expected
