"""Two trainers in two processes, gloo between them, against one trainer on the same data, in float64."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import pairwise

import pytest
import torch

from posttrain.rl import algorithms, metrics
from posttrain.rl.batching import with_scores
from posttrain.rl.config import ModelConfig, TrainerConfig
from posttrain.rl.errors import ActorDied, EngineError
from posttrain.rl.service.groups import LearnerGroup
from posttrain.rl.service.handles import LearnerHandle
from posttrain.rl.types import Scores
from posttrain.trainer import distributed
from posttrain.trainer.distributed import Ranks, Rendezvous
from posttrain.trainer.trainer import Trainer

from .rank_process import RankProcess, summed_gradients
from .tiny import packed, save_tiny, sequences, step_params

SHAPES = {"a": (3, 2), "b": (4,), "c": (2, 2), "d": (1,)}


@pytest.fixture(scope="module")
def processes():
    started = [RankProcess(rank) for rank in range(2)]
    yield started
    for process in started:
        process.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("qwen3"))


def both(processes, method, *arguments):
    """The same method of both ranks at once, each with its own argument; results, or what was raised."""

    def call(process, argument):
        try:
            return process.call(method, *argument)
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, processes, zip(*arguments, strict=True) if arguments else [(), ()]))


def connected(processes, dtype=torch.float64, shapes=None):
    """Bare weights on both ranks; what is returned must live as long as they do."""
    meeting = Rendezvous(2)
    answers = both(processes, "make_weights", meeting.ranks, [dtype] * 2, [shapes or SHAPES] * 2)
    assert answers == [None, None], answers
    return meeting


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_summed_and_absent_ones_stay_absent(processes, dtype):
    meeting = connected(processes, dtype)
    generator = torch.Generator().manual_seed(0)
    for present in (["ad", "ab"], ["", ""], ["abcd", ""], ["c", "abcd"]):  # by rank
        given = [
            {
                name: torch.randn(s, generator=generator, dtype=dtype) if name in names else None
                for name, s in SHAPES.items()
            }
            for names in present
        ]
        one, two = both(processes, "sum", given)
        for name, shape in SHAPES.items():
            parts = [gradients[name] for gradients in given if gradients[name] is not None]
            if not parts:
                assert one[name] is None and two[name] is None
                continue
            expected = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            assert one[name].dtype == dtype and one[name].shape == shape
            assert torch.equal(one[name], expected) and torch.equal(two[name], expected)
    both(processes, "close")
    del meeting


def test_a_gradient_that_is_no_number_reaches_every_rank_under_its_name(processes):
    meeting = connected(processes)
    nothing = dict.fromkeys(SHAPES)
    broken = {**nothing, "b": torch.full((4,), torch.nan, dtype=torch.float64)}
    for answer in both(processes, "sum", [nothing, broken]):
        assert answer["b"].isnan().all() and [name for name in SHAPES if answer[name] is not None] == ["b"]
    both(processes, "close")
    del meeting


def test_a_rank_that_dies_is_an_error_for_the_one_that_waits():
    started = [RankProcess(rank) for rank in range(2)]
    try:
        meeting = connected(started)
        group = LearnerGroup([LearnerHandle(process) for process in started])

        async def step():
            waits = asyncio.create_task(started[0]("optim_step", None))
            await asyncio.sleep(0.2)  # the first rank is in the sum
            assert not waits.done()
            started[1].process.kill()
            with pytest.raises(EngineError, match="trainer 0 of 2 lost the others"):
                await waits
            with pytest.raises(ActorDied) as died:  # of both failures the cause
                await group.optim_step(None)
            assert died.value.actor == "trainer 1"

        asyncio.run(asyncio.wait_for(step(), timeout=60))
        del meeting
    finally:
        for process in started:
            process.end()


def test_a_trainer_that_is_left_alone_says_so(monkeypatch):
    monkeypatch.setattr(distributed, "CONNECT_TIMEOUT", timedelta(seconds=0.3))
    meeting = Rendezvous(2)
    with pytest.raises(EngineError, match="trainer 1 of 2 did not find the others"):
        meeting.ranks[1].connect(torch.device("cpu"))
    port = meeting.ranks[0].port
    del meeting
    with pytest.raises(EngineError, match="trainer 0 of 2 did not find the others"):
        Ranks(0, 2, "127.0.0.1", port).connect(torch.device("cpu"))


def test_the_others_do_not_wait_for_a_trainer_that_could_not_be_built():
    meeting = Rendezvous(3)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ranks.connect, torch.device("cpu")) for ranks in meeting.ranks[:2]]
        time.sleep(0.1)
        assert not any(future.done() for future in waiting)
        meeting.call_off()
        for future in waiting:
            with pytest.raises(EngineError, match="another one could not be built"):
                future.result(timeout=20)


ALGORITHMS = {
    "grpo": {"name": "grpo", "kl_coef": 0.05, "clip_low": 0.05, "clip_high": 0.05},
    "gspo": {"name": "gspo", "clip_low": 0.02, "clip_high": 0.02},
    "dapo": {"name": "dapo", "correction": {"name": "tis", "cap": 1.05}, "entropy_coef": 0.01, "top_entropy": 0.6},
    "cispo": {"name": "cispo", "correction": {"name": "icepop", "low": 0.9, "high": 1.2}, "kl_coef": 0.1},
    "dr_grpo": {"name": "dr_grpo"},
}
UNEVEN = [[40, 3, 9], [2, 14, 6, 1], [11, 5]]
"""Lengths of the sequences of each micro-batch: one of them as long as several others."""
LONE = [[12]]
"""A single sequence for two ranks."""


def batches_of(lengths, seed):
    flat = [length for micro_batch in lengths for length in micro_batch]
    made = sequences(flat, seed)
    bounds = torch.tensor([0, *map(len, lengths)]).cumsum(0).tolist()
    generator = torch.Generator().manual_seed(seed)
    result = []
    for low, high in pairwise(bounds):
        batch = packed(made[low:high], made, len(lengths))
        noise = torch.randn(batch.input_ids.shape, generator=generator, dtype=torch.float64)
        result.append(replace(batch, rollout_logprobs=noise * 0.2 - 3.9))  # about −log of the vocabulary
    return result


async def three_steps(learner, algorithm, lengths):
    """Scores, metrics, norms and the adapter of three optimizer steps that start from an adapter with B = 0."""
    scores, figures, norms = [], [], []
    for step in range(3):
        batches = batches_of(lengths, step)
        old, ref = await learner.score(batches), await learner.score(batches, reference=True)
        scores += [*old, *ref]
        moved = [
            Scores(s.logprobs + 0.1 * torch.sin(b.input_ids), s.entropy) for s, b in zip(old, batches, strict=True)
        ]
        batches = with_scores(batches, moved, ref, algorithm.entropy_quantile)
        figures.append(metrics.values(await learner.forward_backward(batches, algorithm)))
        result = await learner.optim_step(step_params(eps=1e-6, max_grad_norm=0.5))
        norms.append(result.grad_norm)
        assert result.policy_version == step + 1
    return scores, figures, norms, (await learner.export_adapter()).tensors


class Here:
    """A ``Caller`` in this process."""

    def __init__(self, target):
        self.target = target

    async def __call__(self, method, *arguments, **options):
        return getattr(self.target, method)(*arguments, **options)


@pytest.fixture(scope="module")
def trainers(processes, folder, tmp_path_factory):
    """One trainer alone, two trainers as one learner, and the state that all start from."""
    alone, meeting = maker(folder)(), Rendezvous(2)
    answers = both(processes, "make", [maker(folder, ranks=ranks) for ranks in meeting.ranks])
    assert answers == [None, None], answers
    fresh = tmp_path_factory.mktemp("fresh")
    alone.save(fresh)
    yield LearnerHandle(Here(alone)), LearnerGroup([LearnerHandle(process) for process in processes]), fresh
    both(processes, "close")


@pytest.fixture
def single(trainers):
    single, _, fresh = trainers
    asyncio.run(single.load(fresh))
    return single


@pytest.fixture
def group(trainers):
    _, group, fresh = trainers
    asyncio.run(group.load(fresh))
    return group


def maker(folder, **options):
    return partial(
        Trainer, folder, ModelConfig(name=str(folder), dtype="float64"), TrainerConfig(device="cpu"), **options
    )


def difference(one, two):
    """Relative, over all tensors together."""
    assert one.keys() == two.keys()
    flat = [torch.cat([tensors[name].flatten() for name in sorted(one)]) for tensors in (one, two)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize("lengths", [UNEVEN, LONE], ids=["uneven", "lone"])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_two_trainers_do_what_one_does(single, group, name, lengths):
    algorithm = algorithms.parse(ALGORITHMS[name])
    fresh = asyncio.run(single.export_adapter()).tensors
    scores, figures, norms, adapter = asyncio.run(three_steps(single, algorithm, lengths))
    scores2, figures2, norms2, adapter2 = asyncio.run(three_steps(group, algorithm, lengths))
    for one, two in zip(scores, scores2, strict=True):
        torch.testing.assert_close(two.logprobs, one.logprobs, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(two.entropy, one.entropy, rtol=1e-12, atol=1e-13)
    for one, two in zip(figures, figures2, strict=True):
        assert two == pytest.approx(one, rel=1e-11, abs=1e-14)
    assert norms2 == pytest.approx(norms, rel=1e-12) and min(norms) > 1e-3
    moved, moved2 = ({key: tensors[key] - fresh[key] for key in fresh} for tensors in (adapter, adapter2))
    assert difference(moved2, moved) < 1e-12
    weights = [asyncio.run(member.export_adapter()).tensors for member in group.members]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in adapter), "the two differ"


@pytest.mark.parametrize("lengths", [UNEVEN, LONE], ids=["uneven", "lone"])
def test_the_summed_gradient_is_that_of_one_trainer(single, group, processes, lengths):
    algorithm = algorithms.parse("gspo")

    async def gradient(learner):
        batches = batches_of(lengths, seed=7)
        await learner.forward_backward(batches, algorithm)

    asyncio.run(gradient(single))
    asyncio.run(gradient(group))
    expected = {k: g for k, g in summed_gradients(single._call.target).items() if g is not None}
    for found in both(
        processes,
        "summed_gradients",
    ):
        assert difference({k: g for k, g in found.items() if g is not None}, expected) < 1e-12


def test_a_checkpoint_of_one_is_read_by_two_and_the_other_way_round(single, group, tmp_path):
    algorithm = algorithms.parse("grpo")

    async def continued(first, then):
        await three_steps(first, algorithm, UNEVEN)
        await first.save(tmp_path)
        await then.load(tmp_path)
        results = []
        for learner in (first, then):
            await learner.forward_backward(batches_of(UNEVEN, 9), algorithm)
            results.append(await learner.optim_step(step_params(eps=1e-6)))
        assert results[0].policy_version == results[1].policy_version
        return (await then.export_adapter()).tensors, (await first.export_adapter()).tensors

    assert difference(*asyncio.run(continued(single, group))) < 1e-12


def test_the_same_base_on_every_rank(single, group):
    assert asyncio.run(group.checksum()) == asyncio.run(single.checksum()) != ""


def test_trainers_of_one_seed_start_from_the_same_adapter(trainers, single):
    weights = [asyncio.run(member.export_adapter()).tensors for member in trainers[1].members]
    fresh = asyncio.run(single.export_adapter()).tensors
    assert all(torch.equal(tensors[name], fresh[name]) for tensors in weights for name in fresh)
