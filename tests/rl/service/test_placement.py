"""Where sampler and trainer live: one copy of the base, threads, engines, and both closed whatever happens."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from posttrain.rl import claims, machine
from posttrain.rl.batching import BatchSettings, plan
from posttrain.rl.config import from_settings
from posttrain.rl.errors import EngineError
from posttrain.rl.service import blueprint
from posttrain.rl.service.blueprint import check_installed, cpu_threads, engine_name
from posttrain.rl.service.local import ThreadCaller
from posttrain.rl.service.placement import place
from posttrain.rl.service.random_model import materialize
from posttrain.rl.service.weight_sync import publish
from posttrain.rl.types import OptimParams, Prompt, Rollout, RolloutGroup, SamplingParams

from .tiny_runs import settings

PARAMS = SamplingParams(max_tokens=12, temperature=0.8, stop_token_ids=(1,), seed=3)
PROMPTS = [Prompt(f"p{index}", "", {}, tuple(range(2, 4 + index))) for index in range(5)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return materialize(from_settings(**settings()).model, tmp_path_factory.mktemp("model") / "model")


def target(handle):
    return handle._call._target


# -- embedded ----------------------------------------------------------------------------------------------------------


async def test_embedded_sampler_and_trainer_share_the_base_weights(source) -> None:
    async with place(from_settings(**settings()), source, Path(source)) as placement:
        sampler, learner = placement.sampler, placement.learner
        await publish(learner, sampler)
        base = target(learner).base_weights()
        held = {name.replace(".base_layer", ""): w for name, w in target(sampler).model.named_parameters()}
        assert len(base) > 5
        for name, weight in base.items():
            assert held[name].data_ptr() == weight.data_ptr(), name
        adapters = [weight for name, weight in held.items() if ".lora_" in name]
        trained = {weight.data_ptr() for weight in target(learner)._weights.values()}
        assert len(adapters) == len(trained) and not trained & {weight.data_ptr() for weight in adapters}


async def test_full_fine_tuning_samples_from_a_copy(source) -> None:
    async with place(from_settings(**settings(method="full")), source, Path(source)) as placement:
        sampler, learner = placement.sampler, placement.learner
        await publish(learner, sampler)
        held = dict(target(sampler).model.named_parameters())
        trained = target(learner)._weights
        assert held.keys() == trained.keys()
        assert all(held[name].data_ptr() != weight.data_ptr() for name, weight in trained.items())
        assert all(torch.equal(held[name], weight) for name, weight in trained.items())


async def test_the_gpu_is_claimed_while_the_run_lasts(source, monkeypatch, tmp_path) -> None:
    made = blueprint.Blueprint.of(from_settings(**settings()), source)
    assert made.peak_bytes is None
    cards = [machine.Gpu(index, "H", None, None, None, "", uuid=f"GPU-{index}") for index in range(2)]
    monkeypatch.setattr(machine, "gpus", lambda: cards)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(blueprint.Blueprint, "of", lambda *_: dataclasses.replace(made, peak_bytes=7))
    async with place(from_settings(**settings()), source, Path("/runs/mine")):
        [file] = claims.folder().iterdir()
        assert file.name == f"GPU-0_{os.getpid()}.json", "one GPU of two"
        written = json.loads(file.read_text())
        assert (written["size"], written["run"], written["pid"]) == (7, "/runs/mine", os.getpid())
    assert not list(claims.folder().iterdir())
    monkeypatch.setattr(blueprint.Blueprint, "of", lambda *_: made)
    async with place(from_settings(**settings()), source, Path("/runs/mine")):
        assert not list(claims.folder().iterdir()), "a run on a CPU claims no GPU"


@pytest.mark.parametrize("method", ["lora", "full"])
async def test_sampler_and_trainer_agree_on_every_token(source, method) -> None:
    """fp32: at most 1e-4 apart, before and after updates that change the policy visibly."""
    config = from_settings(**settings(method=method, temperature=0.8, dtype="float32"))
    batch_settings = BatchSettings(micro_batch_tokens=50, updates=1, max_tokens=12, temperature=0.8)
    async with place(config, source, Path(source)) as placement:
        sampler, learner = placement.sampler, placement.learner
        previous = None
        for _ in range(3):
            await publish(learner, sampler)
            drawn = await sampler.sample(PROMPTS, 4, PARAMS)
            groups = [
                RolloutGroup(prompt, [Rollout(c, {}, 0.0, (-1.0) ** i) for i, c in enumerate(completions)])
                for prompt, completions in zip(PROMPTS, drawn, strict=True)
            ]
            [batches] = plan(groups, config.algorithm, batch_settings)
            scores = await learner.score(batches)
            gaps = torch.cat([(s.logprobs - b.rollout_logprobs)[b.loss_mask] for s, b in zip(scores, batches)])
            assert len(batches) > 1 and gaps.numel() > 50
            assert float(gaps.abs().max()) <= 1e-4
            text = [c.completion_ids for completions in drawn for c in completions]
            assert text != previous, "the policy moved"
            previous = text
            await learner.forward_backward(batches, config.algorithm)
            await learner.optim_step(OptimParams(0.05 if method == "lora" else 0.01))


async def test_closed_on_leaving_and_after_a_failure(source) -> None:
    with pytest.raises(RuntimeError, match="mine"):
        async with place(from_settings(**settings()), source, Path(source)) as placement:
            sampler, learner = placement.sampler, placement.learner
            engine, trainer = target(sampler), target(learner)
            raise RuntimeError("mine")
    assert not hasattr(engine, "_model") and not hasattr(trainer, "_model")
    await sampler.close()
    await learner.close()


# -- threads -----------------------------------------------------------------------------------------------------------


def test_a_small_model_gets_one_thread(source) -> None:
    assert cpu_threads(from_settings(**settings()), source) == 1


@pytest.mark.parametrize(("max_staleness", "expected"), [(0, 6), (2, 3)])
def test_a_large_model_gets_every_core_or_half_where_both_work_at_once(
    source, monkeypatch, max_staleness, expected
) -> None:
    monkeypatch.setattr(blueprint, "SMALL_MODEL_BYTES", 10)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert cpu_threads(from_settings(**settings(max_staleness=max_staleness)), source) == expected


def test_a_model_from_the_hub_counts_as_large(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert cpu_threads(from_settings(**settings()), "owner/model") == 6


def test_the_configured_count_wins(source) -> None:
    assert cpu_threads(from_settings(**settings(cpu_threads=5)), source) == 5


async def test_each_thread_computes_with_its_own_count() -> None:
    class Counts:
        def threads(self) -> int:
            return torch.get_num_threads()

        def close(self) -> None:
            pass

    one, three = ThreadCaller("one", 1), ThreadCaller("three", 3)
    await one.make(Counts)
    await three.make(Counts)
    assert [await one("threads"), await three("threads"), await one("threads")] == [1, 3, 1]
    await one.close()
    await three.close()
    await three.close()


async def test_a_thread_raises_here_what_was_raised_there() -> None:
    class Fails:
        def go(self) -> None:
            raise EngineError("out of memory")

        def close(self) -> None:
            pass

    caller = ThreadCaller("fails", 1)
    await caller.make(Fails)
    with pytest.raises(EngineError, match="out of memory"):
        await caller("go")
    await caller.close()


async def test_building_fails_here_as_it_failed_there() -> None:
    def fails() -> None:
        raise EngineError("no memory for the weights")

    caller = ThreadCaller("fails", 1)
    with pytest.raises(EngineError, match="no memory for the weights"):
        await caller.make(fails)
    await caller.close()


async def test_where_the_second_cannot_be_built_the_first_is_closed(source, monkeypatch) -> None:
    from posttrain.rollout.transformers_engine import TransformersEngine
    from posttrain.trainer.trainer import Trainer

    closed = []

    def fails(self, *arguments, **keywords) -> None:
        raise EngineError("the engine does not start")

    monkeypatch.setattr(TransformersEngine, "__init__", fails)
    monkeypatch.setattr(Trainer, "close", lambda self: closed.append(True))
    with pytest.raises(EngineError, match="the engine does not start"):
        async with place(from_settings(**settings()), source, Path(source)):
            pass
    assert closed == [True]


# -- engines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "installed", "gpu", "device", "expected"),
    [
        ("transformers", True, True, "auto", "transformers"),
        ("vllm", True, False, "auto", "vllm"),
        ("auto", True, True, "auto", "vllm"),
        ("auto", True, True, "cpu", "transformers"),
        ("auto", True, False, "auto", "transformers"),
        ("auto", False, True, "auto", "transformers"),
    ],
)
def test_engine_for_this_machine(monkeypatch, wanted, installed, gpu, device, expected) -> None:
    monkeypatch.setattr(blueprint.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert engine_name(from_settings(**settings(engine=wanted, device=device))) == expected


def test_vllm_that_is_not_installed(monkeypatch) -> None:
    monkeypatch.setattr(blueprint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r'needs vLLM: pip install "posttrain\[vllm\]", or use "transformers"'):
        engine_name(from_settings(**settings(engine="vllm")))


def test_vllm_takes_adapters_only(monkeypatch) -> None:
    monkeypatch.setattr(blueprint.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(EngineError, match=r'takes LoRA adapters only: use trainer\.method = "lora"'):
        engine_name(from_settings(**settings(engine="vllm", method="full")))
    assert engine_name(from_settings(**settings(engine="auto", method="full"))) == "transformers"


# -- weights arrive ----------------------------------------------------------------------------------------------------


async def test_weights_that_differ_in_one_bit_are_noticed(source, monkeypatch) -> None:
    async with place(from_settings(**settings()), source, Path(source)) as placement:
        sampler, learner = placement.sampler, placement.learner
        published = await publish(learner, sampler)
        assert published.policy_version == 0
        load = target(sampler).load_adapter

        def flips_a_bit(adapter):
            tensors = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
            first = next(iter(tensors.values())).view(-1)
            first[0] = torch.nextafter(first[0], torch.tensor(9.0))
            return load(dataclasses.replace(adapter, tensors=tensors))

        monkeypatch.setattr(target(sampler), "load_adapter", flips_a_bit)
        with pytest.raises(EngineError, match="the sampler holds other weights than the trainer published"):
            await publish(learner, sampler)


def test_an_optimizer_that_is_not_installed_is_refused_before_anything_loads(monkeypatch):
    found = blueprint.importlib.util.find_spec
    monkeypatch.setattr(
        blueprint.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    check_installed(from_settings(**settings(optimizer="adamw")))
    with pytest.raises(EngineError, match=r"adamw_8bit.*posttrain\[bnb\]"):
        check_installed(from_settings(**settings(optimizer="adamw_8bit")))
    with pytest.raises(EngineError, match=r"nf4.*posttrain\[bnb\].*fp8"):
        check_installed(from_settings(**settings(quantization="nf4")))
