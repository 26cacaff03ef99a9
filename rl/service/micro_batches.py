"""How many tokens a micro-batch may cost: half as many whenever one did not fit into the GPU's memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from posttrain.rl.errors import OutOfMemory
from posttrain.rl.packing import tokens
from posttrain.rl.repack import repack

if TYPE_CHECKING:
    from posttrain.rl.config import TrainerConfig
    from posttrain.rl.service.protocols import Learner
    from posttrain.rl.types import TrainBatch

T = TypeVar("T")


class MicroBatchBudget:
    """Tokens of a micro-batch as ``rl.packing`` counts them, from ``trainer.micro_batch_tokens`` downwards for as long
    as it lives.
    """

    def __init__(self, learner: Learner, trainer: TrainerConfig, warn: Callable[[str], None]) -> None:
        self._learner = learner
        self._warn = warn
        self._share = trainer.share_prompts
        self._remedy = _remedy(trainer)
        self.tokens = trainer.micro_batch_tokens

    async def run(self, batches: Sequence[TrainBatch], work: Callable[[Sequence[TrainBatch]], Awaitable[T]]) -> T:
        """Do ``work`` on one update's micro-batches; where the memory runs out, from the start on smaller ones.

        The gradients of a failed attempt are cleared; earlier updates stay. Raises ``OutOfMemory`` where a micro-batch
        of a single sequence does not fit.
        """
        while True:
            if any(self._cost(batch) > self.tokens and _sequences(batch) > 1 for batch in batches):
                batches = repack(batches, self.tokens, share_prompts=self._share)
            try:
                return await work(batches)
            except OutOfMemory as error:
                await self._learner.clear_gradients()
                self._halve(batches, error)

    def _halve(self, batches: Sequence[TrainBatch], error: OutOfMemory) -> None:
        """Below half of the largest micro-batch that can be cut: a budget above what there is would change nothing."""
        divisible = [self._cost(batch) for batch in batches if _sequences(batch) > 1]
        if not divisible:
            longest = max(map(self._cost, batches))
            raise OutOfMemory(
                f"a single sequence does not fit into the trainer's memory (the longest has {longest} tokens): "
                f"{''.join(f'set {setting}, ' for setting in self._remedy)}lower rollout.max_tokens or "
                f"data.max_prompt_tokens, or give the run more memory with gpu_memory_gib ({error})"
            ) from error
        old, self.tokens = self.tokens, max(1, min(self.tokens, max(divisible)) // 2)
        self._warn(
            f"out of memory on micro-batches of up to {max(map(self._cost, batches))} tokens: the update is repeated "
            f"with {self.tokens} tokens in place of {old}, and so is the rest of the run. "
            f"Set {' or '.join([f'trainer.micro_batch_tokens = {self.tokens} to begin with that', *self._remedy])} "
            f"({error})"
        )

    def _cost(self, batch: TrainBatch) -> int:
        return tokens(batch, share=self._share)


def _remedy(trainer: TrainerConfig) -> list[str]:
    """The next setting that leaves less on the GPU, if there is one."""
    if trainer.activation_checkpointing is not True:
        return ["trainer.activation_checkpointing = true"]
    return [] if trainer.offload_activations else ["trainer.offload_activations = true"]


def _sequences(batch: TrainBatch) -> int:
    return batch.cu_seqlens.shape[0] - 1
