"""The vLLM engine on a GPU: CUDA graphs, 16 and fewer bits, sleep, and memory shared with other processes.

Prompts are shorter than a block of the prefix cache, so that a second run computes what the first did.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posttrain.rl.config import ModelConfig, RolloutConfig
from posttrain.rl.errors import EngineError, OutOfMemory
from posttrain.rl.fingerprint import fingerprint
from posttrain.rl.types import Adapter, Completion, Prompt, SamplingParams
from posttrain.rollout.vllm_engine import VllmEngine
from tests.rollout.conftest import (
    LINEAR_LAYERS,
    LORA,
    VOCABULARY,
    make_adapter,
    reference_logits,
    reference_model,
    save_tiny_model,
)
from tests.rollout.gpu_children import child, map_weights, publish

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
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
GIB = 2**30
KV_CACHE = 2 * GIB
# A bfloat16 model rounds each activation to 8 bits; logits of size 10 carry such errors.
MEAN_TOLERANCE = 0.05


@dataclass(frozen=True)
class Case:
    """A started engine and the base weights it computes with, dequantized where they are quantized."""

    engine: VllmEngine
    folder: Path
    base: dict[str, Tensor]
    scheme: str

    def reference(self, adapter: Adapter | None = None) -> torch.nn.Module:
        model = reference_model(self.folder, adapter)
        held = dict(model.named_parameters())
        for name, weight in self.base.items():
            parts = f"base_model.model.{name}".removesuffix(".weight")
            names = [name, f"base_model.model.{name}", f"{parts}.base_layer.weight"]
            target = next(held[known] for known in names if known in held)
            target.data.copy_(weight)
        return model

    def errors(self, groups: list[list[Completion]], adapter: Adapter | None, temperature: float = 1.0) -> Tensor:
        """Engine minus a full float32 forward pass, token by token."""
        model, found = self.reference(adapter), []
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for completion in group:
                expected = (reference_logits(model, prompt, completion) / temperature).log_softmax(-1)
                chosen = expected.gather(1, torch.tensor(completion.completion_ids)[:, None])[:, 0]
                found.append(torch.tensor(completion.rollout_logprobs, dtype=torch.float64) - chosen)
        return torch.cat(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["dense", "slots", "nf4", "fp8", "second runner", "in process"])
def started(request: pytest.FixtureRequest, folder: Path) -> Iterator[Case]:
    """Each kind of engine once for the file."""
    scheme = request.param if request.param in {"nf4", "fp8"} else "dense"
    model = ModelConfig(name=str(folder), quantization="none" if scheme == "dense" else scheme)
    rollout = RolloutConfig(max_model_len=128, lora_backend="slots" if request.param == "slots" else "dense")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "second runner":
            patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        engine = VllmEngine(
            folder,
            model,
            rollout,
            lora_rank=LORA["r"],
            kv_cache_bytes=KV_CACHE,
            sequences=64,
            in_process=request.param == "in process",
        )
    base: dict[str, Tensor] = {}
    try:
        if scheme != "dense":
            with child(map_weights, pickle.dumps(engine.export_weights())) as connection:
                connection.send("dequantized")
                base = connection.recv()
        yield Case(engine, folder, base, scheme)
    finally:
        engine.close()
        engine.close()


@pytest.fixture
def case(started: Case) -> Case:
    started.engine.load_adapter(make_adapter(started.folder, 0, scale=0.0))
    return started


def ids(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.completion_ids for completion in group] for group in groups]


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_same_seed_same_samples_and_each_sample_is_its_own(case: Case) -> None:
    params = SamplingParams(max_tokens=24, seed=5)
    first = case.engine.generate(PROMPTS, 8, params)
    assert ids(case.engine.generate(PROMPTS, 8, params)) == ids(first)
    assert ids(case.engine.generate(PROMPTS, 8, SamplingParams(max_tokens=24, seed=6))) != ids(first)
    assert all(len(set(group)) == 8 for group in ids(first))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_full_forward_pass(case: Case, temperature: float) -> None:
    groups = case.engine.generate(PROMPTS, 16, SamplingParams(max_tokens=24, temperature=temperature))
    assert case.errors(groups, None, temperature).abs().mean().item() < MEAN_TOLERANCE


def test_only_the_kept_tokens_are_drawn_and_renormalised(case: Case) -> None:
    for group in case.engine.generate(PROMPTS, 4, SamplingParams(max_tokens=24, top_k=1)):
        assert len(set(ids([group])[0])) == 1
        assert group[0].rollout_logprobs == (0.0,) * 24
    two = case.engine.generate(PROMPTS[:1], 64, SamplingParams(max_tokens=1, top_k=2))[0]
    seen = {completion.completion_ids[0]: completion.rollout_logprobs[0] for completion in two}
    assert len(seen) == 2
    assert torch.tensor(list(seen.values())).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_padded_vocabulary_is_never_emitted_and_stop_ids_end_a_row(case: Case) -> None:
    hot = case.engine.generate(PROMPTS, 64, SamplingParams(max_tokens=24, temperature=2.0))
    assert max(token for group in ids(hot) for row in group for token in row) < VOCABULARY
    stops = {1, 5, 11, 30}
    reasons = set()
    for group in case.engine.generate(PROMPTS, 32, SamplingParams(max_tokens=12, stop_token_ids=tuple(stops))):
        for completion in group:
            *before, last = completion.completion_ids
            reasons.add(completion.finish_reason)
            assert not set(before) & stops
            assert (last in stops) == (completion.finish_reason == "stop")
            assert completion.finish_reason == "stop" or len(completion.completion_ids) == 12
    assert reasons == {"stop", "length"}


def test_abandoned_stream_leaves_the_engine_ready(case: Case) -> None:
    expected = ids(case.engine.generate(PROMPTS, 4, GREEDY))
    stream = case.engine.stream(PROMPTS * 8, 8, SamplingParams(max_tokens=100))
    next(stream)
    stream.close()
    adapter = make_adapter(case.folder, 1, scale=0.0)
    assert case.engine.load_adapter(adapter) == fingerprint(adapter.tensors)
    assert ids(case.engine.generate(PROMPTS, 4, GREEDY)) == expected


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_each_published_adapter_is_the_one_in_use(case: Case) -> None:
    base, outputs = ids(case.engine.generate(PROMPTS, 1, GREEDY)), []
    for version, seed in ((1, 1), (2, 2), (3, 1)):
        adapter = make_adapter(case.folder, version, seed=seed)
        assert case.engine.load_adapter(adapter) == fingerprint(adapter.tensors)
        outputs.append(ids(case.engine.generate(PROMPTS, 1, GREEDY)))
        sampled = case.engine.generate(PROMPTS, 16, SamplingParams(max_tokens=24))
        assert {completion.policy_version for group in sampled for completion in group} == {version}
        assert case.errors(sampled, adapter).abs().mean().item() < MEAN_TOLERANCE
    assert outputs[0] == outputs[2] != outputs[1]
    assert base not in outputs
    case.engine.load_adapter(make_adapter(case.folder, 4, scale=0.0))
    assert ids(case.engine.generate(PROMPTS, 1, GREEDY)) == base


@pytest.mark.parametrize("layer", LINEAR_LAYERS)
def test_each_projection_alone_changes_the_logprobs_as_peft_says(case: Case, layer: str) -> None:
    every = make_adapter(case.folder, 1, seed=3, scale=1.0)
    tensors = {
        name: tensor if ".lora_A." in name or name.split(".")[-3] == layer else torch.zeros_like(tensor)
        for name, tensor in every.tensors.items()
    }
    adapter = Adapter(1, "lora", tensors, LORA)
    case.engine.load_adapter(adapter)
    groups = case.engine.generate(PROMPTS, 16, SamplingParams(max_tokens=24))
    error = case.errors(groups, adapter).abs().mean().item()
    assert error < MEAN_TOLERANCE
    assert case.errors(groups, None).abs().mean().item() > 3 * error


def test_adapter_that_does_not_fit_is_refused_and_the_last_one_stays(case: Case) -> None:
    case.engine.load_adapter(make_adapter(case.folder, 1))
    before = ids(case.engine.generate(PROMPTS, 2, GREEDY))
    adapter = make_adapter(case.folder, 2, seed=2)
    renamed = {name.replace("layers.1", "layers.7"): tensor for name, tensor in adapter.tensors.items()}
    with pytest.raises(EngineError, match=r"missing base_model.model.model.layers.1"):
        case.engine.load_adapter(Adapter(2, "lora", renamed, LORA))
    assert ids(case.engine.generate(PROMPTS, 2, GREEDY)) == before


def test_adapters_come_through_gpu_memory_of_another_process(case: Case) -> None:
    with child(publish, torch.bfloat16) as connection:
        for version, seed in ((1, 1), (2, 2), (3, 1)):
            adapter = make_adapter(case.folder, version, seed=seed)
            case.engine.load_adapter(adapter)
            expected = ids(case.engine.generate(PROMPTS, 2, GREEDY))
            case.engine.load_adapter(make_adapter(case.folder, 0, scale=0.0))
            connection.send((version, dict(adapter.config), dict(adapter.tensors)))
            published = pickle.loads(connection.recv())
            assert case.engine.load_adapter(published) == published.fingerprint
            assert ids(case.engine.generate(PROMPTS, 2, GREEDY)) == expected


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_the_same_memory_in_another_process(case: Case) -> None:
    weights = case.engine.export_weights()
    assert weights.keys() == dict(reference_model(case.folder).named_parameters()).keys()
    assert {name: weight.repacked for name, weight in weights.items() if weight.repacked} == {}
    assert {weight.scheme for name, weight in weights.items() if "_proj" in name} == {case.scheme}
    expected = {name: dict(weight.checksums) for name, weight in weights.items()}
    before = ids(case.engine.generate(PROMPTS, 1, GREEDY))
    with child(map_weights, pickle.dumps(weights)) as connection:
        connection.send("checksums")
        assert connection.recv() == expected
        connection.send("allocated")
        assert connection.recv() == 0
        connection.send("flip")
        assert connection.recv()
        changed = case.engine.export_weights()
        assert all(
            changed[name].checksums[part] != digest
            for name, parts in expected.items()
            for part, digest in parts.items()
        )
        connection.send("flip")
        assert connection.recv()
    again = case.engine.export_weights()
    assert {name: dict(weight.checksums) for name, weight in again.items()} == expected
    assert ids(case.engine.generate(PROMPTS, 1, GREEDY)) == before


# -- memory -----------------------------------------------------------------------------------------------------------


def free() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_sleep_gives_the_cache_back_and_waking_restores_the_policy(case: Case) -> None:
    case.engine.load_adapter(make_adapter(case.folder, 1))
    before = ids(case.engine.generate(PROMPTS, 8, GREEDY))
    for _ in range(3):
        awake = free()
        case.engine.sleep()
        case.engine.sleep()
        assert free() - awake > 0.95 * KV_CACHE
        with pytest.raises(EngineError, match="asleep"):
            case.engine.generate(PROMPTS, 1, GREEDY)
        case.engine.wake()
        case.engine.wake()
        assert abs(free() - awake) < 0.05 * KV_CACHE
        assert ids(case.engine.generate(PROMPTS, 8, GREEDY)) == before


def test_adapter_published_to_a_sleeping_engine_is_in_use_after_waking(case: Case) -> None:
    adapter = make_adapter(case.folder, 1, seed=4)
    case.engine.load_adapter(adapter)
    expected = ids(case.engine.generate(PROMPTS, 1, GREEDY))
    case.engine.load_adapter(make_adapter(case.folder, 2, scale=0.0))
    case.engine.sleep()
    assert case.engine.load_adapter(adapter) == fingerprint(adapter.tensors)
    case.engine.wake()
    assert ids(case.engine.generate(PROMPTS, 1, GREEDY)) == expected


def test_waking_without_room_can_be_tried_again(case: Case) -> None:
    expected = ids(case.engine.generate(PROMPTS, 2, GREEDY))
    case.engine.sleep()
    room = free()
    block = torch.empty(room - KV_CACHE // 2, dtype=torch.uint8, device="cuda")
    with pytest.raises(OutOfMemory):
        case.engine.wake()
    with pytest.raises(EngineError, match="asleep"):
        case.engine.generate(PROMPTS, 1, GREEDY)
    del block
    assert abs(free() - room) < 0.05 * KV_CACHE
    case.engine.wake()
    assert ids(case.engine.generate(PROMPTS, 2, GREEDY)) == expected


def test_a_gpu_without_room_is_refused_with_the_numbers(folder: Path) -> None:
    total = torch.cuda.mem_get_info()[1]
    with pytest.raises(EngineError, match=r"vLLM needs .* GiB .* are free on"):
        VllmEngine(folder, ModelConfig(name=str(folder)), RolloutConfig(max_model_len=128), kv_cache_bytes=total)


@pytest.mark.parametrize("asleep", [False, True])
def test_closing_gives_everything_back_in_this_process_too(folder: Path, asleep: bool) -> None:
    before = free()
    engine = VllmEngine(
        folder,
        ModelConfig(name=str(folder)),
        RolloutConfig(max_model_len=128, enforce_eager=True),
        lora_rank=4,
        kv_cache_bytes=KV_CACHE,
        sequences=8,
        in_process=True,
    )
    engine.generate(PROMPTS, 2, GREEDY)
    if asleep:
        engine.sleep()
    engine.close()
    assert before - free() < GIB // 4
