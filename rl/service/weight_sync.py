"""Publishing trained weights to the sampler, and proof that they arrived."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import fingerprint
from posttrain.rl.timeline import Timeline
from posttrain.rl.types import SharedAdapter

if TYPE_CHECKING:
    from posttrain.rl.service.protocols import Learner, Sampler
    from posttrain.rl.types import Publication


@dataclass(slots=True, frozen=True)
class Published:
    """What the sampler holds now."""

    policy_version: int
    fingerprint: str


async def publish(learner: Learner, sampler: Sampler, timeline: Timeline | None = None) -> Published:
    """Hand the trainer's newest weights to the sampler, on every GPU; the sampler may be asleep.

    Raises ``EngineError`` when an engine holds anything else afterwards, or two trainers differ: training on samples of
    the wrong weights exits 0 and learns nothing.
    """
    pairs = zip(learner.members, sampler.members, strict=True)
    timeline = timeline or Timeline()
    published = await asyncio.gather(*(_publish(one, other, timeline) for one, other in pairs))
    if len(set(published)) > 1:
        raise EngineError(
            f"the trainers of {len(published)} GPUs hold different weights: {', '.join(map(str, published))}"
        )
    return published[0]


async def _publish(learner: Learner, sampler: Sampler, timeline: Timeline) -> Published:
    with timeline.span("export"):
        adapter = await learner.publish_adapter()
    with timeline.span("load"):
        sent, held = await asyncio.gather(_fingerprint(adapter), sampler.load_adapter(adapter))
    if held != sent:
        raise EngineError(
            f"the sampler holds other weights than the trainer published (version {adapter.policy_version}: "
            f"sent {sent}, held {held}); the run stops rather than train on samples of the wrong policy"
        )
    return Published(adapter.policy_version, sent)


async def _fingerprint(adapter: Publication) -> str:
    """Of what is sent; worked out here, in a thread, where the trainer did not."""
    if isinstance(adapter, SharedAdapter):
        return adapter.fingerprint
    return await asyncio.to_thread(fingerprint, adapter.tensors)
