"""What every rollout engine must do, checked against plain transformers and peft."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from posttrain.rl.config import ModelConfig, RolloutConfig
from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import fingerprint
from posttrain.rl.types import Adapter, Completion, Prompt, SamplingParams
from posttrain.rollout.engine import Engine
from tests.rollout.conftest import LORA, VOCABULARY, make_adapter, reference_logits, reference_model

EOS = 1
PROMPTS = [
    Prompt("a", "", {}, (7, 8, 9)),
    Prompt("b", "", {}, (3, 30, 4, 31, 12, 13, 14, 15, 16, 17, 18)),
    Prompt("c", "", {}, (20,)),
]
VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
ENGINES = [
    pytest.param("transformers", id="transformers"),
    pytest.param("dense", id="vllm-dense", marks=VLLM),
    pytest.param("slots", id="vllm-slots", marks=VLLM),
]
TOLERANCE = {"transformers": 1e-4, "dense": 1e-3, "slots": 1e-3}


def build(kind: str, folder: Path) -> Engine:
    """An engine on the folder, with room for 64 tokens; ``dense`` in this process, ``slots`` in one of its own."""
    model, rollout = ModelConfig(name=str(folder)), RolloutConfig(max_sequences=16, max_model_len=64)
    if kind == "transformers":
        from posttrain.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(folder, model, rollout)
    from posttrain.rollout.vllm_engine import VllmEngine

    rollout = rollout.model_copy(update={"lora_backend": kind, "enforce_eager": True})
    return VllmEngine(
        folder,
        model,
        rollout,
        lora_rank=LORA["r"],
        kv_cache_bytes=2**24,
        sequences=16,
        in_process=kind == "dense",
    )


@pytest.fixture(scope="module", params=ENGINES)
def started(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[tuple[str, Engine]]:
    """Each engine is started once for the file."""
    engine = build(request.param, tiny_model)
    yield request.param, engine
    engine.close()
    engine.close()


@pytest.fixture
def engine(started: tuple[str, Engine], tiny_model: Path) -> Engine:
    """The engine with an adapter that changes nothing."""
    started[1].load_adapter(make_adapter(tiny_model, 0, scale=0.0))
    return started[1]


@pytest.fixture
def tolerance(started: tuple[str, Engine]) -> float:
    """Largest difference between an engine's logprobs and those of a full forward pass."""
    return TOLERANCE[started[0]]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> torch.nn.Module:
    """The base model."""
    return reference_model(tiny_model)


def sampling(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, **changes})


def flat(groups: list[list[Completion]]) -> list[tuple[Prompt, Completion]]:
    assert len(groups) == len(PROMPTS)
    return [(prompt, completion) for prompt, group in zip(PROMPTS, groups) for completion in group]


def ids(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.completion_ids for completion in group] for group in groups]


def worst(model: torch.nn.Module, groups: list[list[Completion]], temperature: float = 1.0) -> float:
    """Largest |engine logprob - logprob of a full forward pass at the sampling temperature|."""
    differences = []
    for prompt, completion in flat(groups):
        expected = (reference_logits(model, prompt, completion) / temperature).log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(completion.completion_ids)[:, None])[:, 0]
        differences.append((chosen - torch.tensor(completion.rollout_logprobs, dtype=torch.float64)).abs().max().item())
    return max(differences)


def test_same_seed_same_samples_and_each_sample_is_its_own(engine: Engine) -> None:
    first = engine.generate(PROMPTS, 4, sampling(seed=5))
    assert engine.generate(PROMPTS, 4, sampling(seed=5)) == first
    assert ids(engine.generate(PROMPTS, 4, sampling(seed=6))) != ids(first)
    for group in ids(first):
        assert len(set(group)) == 4


def test_sample_does_not_depend_on_what_else_is_in_the_batch(engine: Engine, tolerance: float) -> None:
    together = engine.generate(PROMPTS, 9, sampling(seed=3))  # 27 rows: more than max_sequences
    for prompt, group in zip(PROMPTS, together):
        alone = engine.generate([prompt], 2, sampling(seed=3))[0]
        for left, right in zip(alone, group):
            assert left.completion_ids == right.completion_ids
            assert left.rollout_logprobs == pytest.approx(right.rollout_logprobs, abs=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_are_those_of_a_full_forward_pass_at_the_sampling_temperature(
    engine: Engine, reference: torch.nn.Module, tolerance: float, temperature: float, record_property: Any
) -> None:
    groups = engine.generate(PROMPTS, 4, sampling(temperature=temperature))
    difference = worst(reference, groups, temperature)
    record_property("max_logprob_difference", difference)
    assert difference < tolerance


def kept_logprobs(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Brute force in plain Python: min-p, then the k best, then the shortest most-probable list that reaches top_p."""
    probabilities = {token: math.exp(value / params.temperature) for token, value in enumerate(logits)}

    def normalised(kept: dict[int, float]) -> dict[int, float]:
        total = math.fsum(kept.values())
        return {token: value / total for token, value in sorted(kept.items(), key=lambda item: -item[1])}

    kept = normalised(probabilities)
    if params.min_p:
        kept = normalised({t: p for t, p in kept.items() if p >= params.min_p * max(kept.values())})
    if params.top_k:
        kept = normalised(dict(list(kept.items())[: params.top_k]))
    if params.top_p < 1:
        nucleus: dict[int, float] = {}
        for token, probability in kept.items():
            if math.fsum(nucleus.values()) >= params.top_p:
                break
            nucleus[token] = probability
        kept = normalised(nucleus)
    return {token: math.log(probability) for token, probability in kept.items()}


@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": 3},
        {"top_k": 1},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 8, "top_p": 0.8, "min_p": 0.05, "temperature": 1.4},
    ],
    ids=str,
)
def test_truncated_logprobs_are_renormalised_over_the_kept_tokens(
    engine: Engine, reference: torch.nn.Module, tolerance: float, cut: dict[str, Any]
) -> None:
    params = sampling(**cut)
    for prompt, completion in flat(engine.generate(PROMPTS, 4, params)):
        logits = reference_logits(reference, prompt, completion).tolist()
        for row, token, logprob in zip(logits, completion.completion_ids, completion.rollout_logprobs):
            kept = kept_logprobs(row, params)
            assert token in kept
            assert logprob == pytest.approx(kept[token], abs=tolerance)


@pytest.mark.parametrize("cut", [{"temperature": 1.3}, {"top_p": 0.8}], ids=str)
def test_sampled_frequencies_follow_the_distribution(
    engine: Engine, reference: torch.nn.Module, cut: dict[str, Any]
) -> None:
    params, draws = sampling(max_tokens=1, **cut), 3000
    completions = engine.generate(PROMPTS[:1], draws, params)[0]
    logits = reference_logits(reference, PROMPTS[0], completions[0])[0].tolist()
    expected = {token: draws * math.exp(logprob) for token, logprob in kept_logprobs(logits, params).items()}
    counts = dict.fromkeys(expected, 0)
    for completion in completions:
        counts[completion.completion_ids[0]] += 1
    common = [token for token in expected if expected[token] >= 8]
    rare = [token for token in expected if expected[token] < 8]
    cells = [(counts[token], expected[token]) for token in common]
    if rare:
        cells.append((sum(counts[token] for token in rare), sum(expected[token] for token in rare)))
    assert len(cells) >= 5
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    tail = torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2.0), torch.tensor(statistic / 2)).item()
    assert tail > 1e-3, f"chi-square {statistic:.1f} with {len(cells) - 1} degrees of freedom"


def test_stop_token_ends_the_row_and_is_its_last_token(engine: Engine, tiny_model: Path) -> None:
    stops = (EOS, 5, 11, 30)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    reasons = set()
    for _, completion in flat(engine.generate(PROMPTS, 12, sampling(stop_token_ids=stops))):
        *before, last = completion.completion_ids
        reasons.add(completion.finish_reason)
        assert not set(before) & set(stops)
        assert len(completion.rollout_logprobs) == len(completion.completion_ids) <= 12
        if completion.finish_reason == "stop":
            assert last in stops
            assert completion.text == tokenizer.decode(before, skip_special_tokens=True)
        else:
            assert last not in stops and len(completion.completion_ids) == 12
            assert completion.text == tokenizer.decode([*before, last], skip_special_tokens=True)
    assert reasons == {"stop", "length"}


def test_without_stop_ids_the_end_token_is_a_token_like_any_other(engine: Engine) -> None:
    completions = [completion for _, completion in flat(engine.generate(PROMPTS, 20, sampling()))]
    assert all(completion.finish_reason == "length" for completion in completions)
    assert any(EOS in completion.completion_ids[:-1] for completion in completions)
    assert all("<eos>" not in completion.text for completion in completions)


def test_shorter_budget_gives_the_beginning_of_the_longer_sample(engine: Engine) -> None:
    long, short = (engine.generate(PROMPTS, 3, sampling(max_tokens=length)) for length in (24, 5))
    for (_, left), (_, right) in zip(flat(long), flat(short)):
        assert len(left.completion_ids) == 24
        assert right.completion_ids == left.completion_ids[:5]


def test_row_ends_at_the_longest_length_the_engine_takes(engine: Engine) -> None:
    prompt = Prompt("long", "", {}, (7,) * 60)
    completion = engine.generate([prompt], 1, sampling())[0][0]
    assert len(completion.completion_ids) == 4
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("length", [0, 64, 100])
def test_prompt_that_leaves_no_room_is_refused(engine: Engine, length: int) -> None:
    with pytest.raises(EngineError, match="max_prompt_tokens"):
        engine.generate([Prompt("p", "", {}, (7,) * length)], 1, sampling())


def test_padded_vocabulary_is_never_emitted(engine: Engine) -> None:
    groups = engine.generate(PROMPTS, 30, sampling(temperature=2.0))
    assert max(token for _, completion in flat(groups) for token in completion.completion_ids) < VOCABULARY


def greedy_by_hand(model: torch.nn.Module, prompt: Prompt, length: int) -> tuple[int, ...]:
    """transformers' own generate, one prompt at a time, without the padded ids."""
    output = model.generate(
        input_ids=torch.tensor([prompt.prompt_ids]),
        attention_mask=torch.ones(1, len(prompt.prompt_ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=[],
        suppress_tokens=list(range(VOCABULARY, model.config.vocab_size)),
    )
    return tuple(output[0, len(prompt.prompt_ids) :].tolist())


def test_greedy_equals_transformers_generate_for_uneven_prompts(
    engine: Engine, reference: torch.nn.Module, tolerance: float
) -> None:
    groups = engine.generate(PROMPTS, 2, sampling(temperature=0.0, max_tokens=20))
    for prompt, group in zip(PROMPTS, groups):
        expected = greedy_by_hand(reference, prompt, 20)
        assert [completion.completion_ids for completion in group] == [expected, expected]
    assert worst(reference, groups) < tolerance


def test_adapter_changes_greedy_output_and_agrees_with_peft(engine: Engine, tiny_model: Path, tolerance: float) -> None:
    base = engine.generate(PROMPTS, 1, sampling(temperature=0.0))
    for version, seed in ((3, 1), (4, 2), (9, 1)):
        adapter = make_adapter(tiny_model, version, seed=seed)
        assert engine.load_adapter(adapter) == fingerprint(adapter.tensors)
        tuned = reference_model(tiny_model, adapter)
        greedy = engine.generate(PROMPTS, 1, sampling(temperature=0.0))
        assert ids(greedy) != ids(base)
        assert [group[0] for group in ids(greedy)] == [greedy_by_hand(tuned, prompt, 12) for prompt in PROMPTS]
        sampled = engine.generate(PROMPTS, 3, sampling(temperature=0.8))
        assert worst(tuned, sampled, 0.8) < tolerance
        assert {completion.policy_version for _, completion in flat(sampled)} == {version}


def test_stream_gives_each_group_once_and_complete(engine: Engine) -> None:
    params = sampling(seed=5, max_tokens=20)
    expected = engine.generate(PROMPTS, 3, params)
    streamed = list(engine.stream(PROMPTS, 3, params))
    assert sorted(index for index, _ in streamed) == [0, 1, 2]
    assert [dict(streamed)[index] for index in range(3)] == expected


def test_abandoned_stream_leaves_nothing_behind(engine: Engine, tiny_model: Path, tolerance: float) -> None:
    engine.load_adapter(make_adapter(tiny_model, 1, seed=1))
    for leave in ("close", "exception", "unstarted"):
        stream = engine.stream(PROMPTS * 3, 4, sampling(max_tokens=30))
        if leave == "close":
            next(stream)
        elif leave == "exception":
            with pytest.raises(ZeroDivisionError):
                for index, _ in stream:
                    index // 0
        stream.close()
        adapter = make_adapter(tiny_model, 2, seed=2)
        assert engine.load_adapter(adapter) == fingerprint(adapter.tensors)  # which is refused while rows are drawn
        assert worst(reference_model(tiny_model, adapter), engine.generate(PROMPTS, 2, sampling())) < tolerance


def broken(adapter: Adapter, how: str) -> Adapter:
    """The adapter with one thing wrong."""
    tensors = dict(adapter.tensors)
    name = next(name for name in tensors if "layers.1" in name and "up_proj.lora_B" in name)
    if how == "renamed":
        for side in ("lora_A", "lora_B"):
            old = name.replace("lora_B", side)
            tensors[old.replace("layers.1", "layers.7")] = tensors.pop(old)
    elif how == "one side missing":
        del tensors[name]
    elif how == "module missing":
        del tensors[name], tensors[name.replace("lora_B", "lora_A")]
    elif how == "shape":
        tensors[name] = tensors[name][:-1]
    return Adapter(adapter.policy_version, adapter.kind, tensors, adapter.config)


@pytest.mark.parametrize("how", ["renamed", "one side missing", "module missing", "shape"])
def test_adapter_that_does_not_fit_is_refused_and_the_old_one_stays(engine: Engine, tiny_model: Path, how: str) -> None:
    engine.load_adapter(make_adapter(tiny_model, 1, seed=1))
    before = engine.generate(PROMPTS, 2, sampling())
    with pytest.raises(EngineError):
        engine.load_adapter(broken(make_adapter(tiny_model, 2, seed=2), how))
    assert engine.generate(PROMPTS, 2, sampling()) == before
    adapter = make_adapter(tiny_model, 3, seed=3)
    assert engine.load_adapter(adapter) == fingerprint(adapter.tensors)


def test_sleep_and_wake_leave_the_policy_unchanged(engine: Engine, tiny_model: Path) -> None:
    engine.load_adapter(make_adapter(tiny_model, 1))
    before = engine.generate(PROMPTS, 2, sampling())
    engine.sleep()
    engine.sleep()
    with pytest.raises(EngineError, match="asleep"):
        engine.generate(PROMPTS, 2, sampling())
    engine.wake()
    engine.wake()
    assert engine.generate(PROMPTS, 2, sampling()) == before


def test_adapter_published_to_a_sleeping_engine_is_in_use_after_waking(engine: Engine, tiny_model: Path) -> None:
    engine.sleep()
    adapter = make_adapter(tiny_model, 2, seed=4)
    assert engine.load_adapter(adapter) == fingerprint(adapter.tensors)
    engine.wake()
    greedy = engine.generate(PROMPTS, 1, sampling(temperature=0.0))
    tuned = reference_model(tiny_model, adapter)
    assert [group[0] for group in ids(greedy)] == [greedy_by_hand(tuned, prompt, 12) for prompt in PROMPTS]
