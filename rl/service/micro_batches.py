"""How many tokens a micro-batch may have: half as many whenever one did not fit into the GPU's memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from posttrain.rl.errors import OutOfMemory
from posttrain.rl.repack import repack

if TYPE_CHECKING:
    from posttrain.rl.service.protocols import Learner
    from posttrain.rl.types import TrainBatch

T = TypeVar("T")


class MicroBatchBudget:
    """Tokens of a micro-batch, from ``trainer.micro_batch_tokens`` downwards for as long as it lives."""

    def __init__(self, learner: Learner, tokens: int, warn: Callable[[str], None]) -> None:
        self._learner = learner
        self._warn = warn
        self.tokens = tokens

    async def run(self, batches: Sequence[TrainBatch], work: Callable[[Sequence[TrainBatch]], Awaitable[T]]) -> T:
        """Do ``work`` on one update's micro-batches; where the memory runs out, from the start on smaller ones.

        The gradients of a failed attempt are cleared; earlier updates stay. Raises ``OutOfMemory`` where a micro-batch
        of a single sequence does not fit.
        """
        while True:
            if any(_tokens(batch) > self.tokens and _sequences(batch) > 1 for batch in batches):
                batches = repack(batches, self.tokens)
            try:
                return await work(batches)
            except OutOfMemory as error:
                await self._learner.clear_gradients()
                self._halve(batches, error)

    def _halve(self, batches: Sequence[TrainBatch], error: OutOfMemory) -> None:
        """Below half of the largest micro-batch that can be cut: a budget above what there is would change nothing."""
        divisible = [_tokens(batch) for batch in batches if _sequences(batch) > 1]
        if not divisible:
            longest = max(_tokens(batch) for batch in batches)
            raise OutOfMemory(
                f"a single sequence does not fit into the trainer's memory (the longest has {longest} tokens): set "
                "trainer.activation_checkpointing = true, lower rollout.max_tokens or data.max_prompt_tokens, or give "
                f"the run more memory with gpu_memory_gib ({error})"
            ) from error
        old, self.tokens = self.tokens, max(1, min(self.tokens, max(divisible)) // 2)
        self._warn(
            f"out of memory on micro-batches of up to {max(map(_tokens, batches))} tokens: the update is repeated with "
            f"{self.tokens} tokens in place of {old}, and so is the rest of the run. Set trainer.micro_batch_tokens = "
            f"{self.tokens} to begin with that, or trainer.activation_checkpointing = true ({error})"
        )


def _tokens(batch: TrainBatch) -> int:
    return batch.input_ids.shape[0]


def _sequences(batch: TrainBatch) -> int:
    return batch.cu_seqlens.shape[0] - 1
