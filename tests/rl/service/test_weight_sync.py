"""Publishing: what is sent is what is held, through host memory or the GPU's, on every GPU."""

from __future__ import annotations

import pytest
import torch

from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import fingerprint
from posttrain.rl.service.weight_sync import Published, publish
from posttrain.rl.timeline import Timeline
from posttrain.rl.types import SharedAdapter, SharedTensor
from tests.fakes import FakeLearner, FakeSampler


class Mapped(FakeLearner):
    """Publishes through memory it shares with the sampler; the fingerprint comes with it."""

    async def publish_adapter(self):
        buffer = SharedTensor(torch.tensor([self.weight]))
        return SharedAdapter(self.version, {}, buffer, (("weight", 0, (1,)),), f"sum of {self.weight}")


class Mapping(FakeSampler):
    async def load_adapter(self, adapter):
        self.version = adapter.policy_version
        return "something else" if self.corrupt else f"sum of {adapter.buffer.handle.item()}"


class Pair:
    """Several members as one."""

    def __init__(self, *members) -> None:
        self.members = members


async def test_through_host_memory() -> None:
    learner, sampler, timeline = FakeLearner(), FakeSampler(), Timeline()
    learner.version, learner.weight = 3, 0.25
    published = await publish(learner, sampler, timeline)
    assert published == Published(3, fingerprint({"weight": torch.tensor([0.25])}))
    assert sampler.version == 3
    assert [span.name for span in timeline.cut().spans] == ["export", "load"]


async def test_through_shared_memory_the_trainers_own_fingerprint_counts() -> None:
    learner, sampler = Mapped(), Mapping()
    learner.version, learner.weight = 5, 0.5
    assert await publish(learner, sampler) == Published(5, "sum of 0.5")
    assert sampler.version == 5
    sampler.corrupt = True
    with pytest.raises(EngineError, match=r"version 5: sent sum of 0\.5, held something else"):
        await publish(learner, sampler)


async def test_a_sleeping_sampler_takes_weights() -> None:
    learner, sampler = FakeLearner(), FakeSampler()
    await sampler.sleep()
    await publish(learner, sampler)
    assert sampler.version == 0 and not sampler.awake


async def test_each_trainer_serves_the_sampler_on_its_gpu() -> None:
    learners, samplers = [Mapped(), Mapped()], [Mapping(), Mapping()]
    for learner in learners:
        learner.version, learner.weight = 2, 1.0
    assert await publish(Pair(*learners), Pair(*samplers)) == Published(2, "sum of 1.0")
    assert [sampler.version for sampler in samplers] == [2, 2]
    learners[1].weight = 1.5
    with pytest.raises(EngineError, match="the trainers of 2 GPUs hold different weights"):
        await publish(Pair(*learners), Pair(*samplers))
