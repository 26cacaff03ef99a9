"""Trainers on several GPUs: where they find each other, and the sum of their gradients.

Every loss is divided by the counts of the whole optimizer step, so the sum over ranks is the gradient of one GPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.rl.errors import EngineError

CONNECT_TIMEOUT = timedelta(minutes=10)
"""How long a trainer waits for the others to load their models."""
SUM_TIMEOUT = timedelta(minutes=2)
"""How long a sum may take; ranks enter it together, once every one has its gradients."""
_CALLED_OFF = "called off"


class Rendezvous:
    """Where the trainers of one group find each other. Lives in the process that starts them, as long as they do; a
    group that is started again needs another one.
    """

    def __init__(self, world_size: int, host: str = "127.0.0.1") -> None:
        """``host``: this machine, as the trainers reach it. The port is any free one."""
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.ranks = [Ranks(rank, world_size, host, self._store.port) for rank in range(world_size)]
        """One for each trainer."""

    def call_off(self) -> None:
        """One of them could not be built: those that wait for it give up."""
        self._store.set(_CALLED_OFF, "")


@dataclass(slots=True)
class Ranks:
    """One trainer's place among those that train together."""

    rank: int
    world_size: int
    host: str
    port: int
    """Of the ``Rendezvous``."""
    _buffer: Tensor | None = field(default=None, repr=False)

    def connect(self, device: torch.device) -> None:
        """Wait for the others. NCCL on a GPU, gloo on a CPU. Raises ``EngineError`` when they do not come."""
        on_gpu = device.type == "cuda"
        try:
            store = dist.TCPStore(self.host, self.port, is_master=False, timeout=CONNECT_TIMEOUT)
            self._await_others(store)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=SUM_TIMEOUT,
                device_id=device if on_gpu else None,
            )
        except (RuntimeError, ValueError) as error:
            raise EngineError(self._lost("did not find", error)) from None

    def sum_gradients(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Replace each gradient by its sum over all ranks, bit for bit the same on every one.

        A rank without a gradient adds 0; a weight without one on any rank keeps none. Raises ``EngineError`` when
        another rank is gone or does not come within ``SUM_TIMEOUT``; the group is of no use then.
        """
        buffer = self._flat(weights)
        sizes = [weight.numel() for weight in weights.values()]
        *parts, present = buffer.split([*sizes, len(sizes)])
        present.zero_()
        for index, (weight, part) in enumerate(zip(weights.values(), parts, strict=True)):
            if weight.grad is None:
                part.zero_()
            else:
                part.copy_(weight.grad.reshape(-1))
                present[index] = 1
        try:
            dist.all_reduce(buffer)
            counts = present.tolist()  # on a GPU the sum is waited for here
        except RuntimeError as error:
            raise EngineError(self._lost("lost", error)) from None
        for weight, part, count in zip(weights.values(), parts, counts, strict=True):
            weight.grad = part.view_as(weight) if count else None

    def close(self) -> None:
        """Leave the group; safe to call twice, and when the others are gone."""
        self._buffer = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _await_others(self, store: dist.Store) -> None:
        store.set(f"here/{self.rank}", "")
        expected = [f"here/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + CONNECT_TIMEOUT.total_seconds()
        while not store.check(expected):
            if store.check([_CALLED_OFF]):
                raise RuntimeError("another one could not be built")
            if time.monotonic() > deadline:
                raise RuntimeError(f"they did not come within {CONNECT_TIMEOUT}")
            time.sleep(0.02)

    def _flat(self, weights: Mapping[str, nn.Parameter]) -> Tensor:
        """Room for every gradient and one flag a weight, allocated once: a rank that runs out of memory in the middle
        of an optimizer step would leave the others waiting. Gradients are views of it until they are cleared.
        """
        if self._buffer is None:
            kinds = {(weight.dtype, weight.device) for weight in weights.values()}
            assert len(kinds) == 1, f"weights of one type on one device, not {kinds}"
            [(dtype, device)] = kinds
            numel = sum(weight.numel() for weight in weights.values())
            self._buffer = torch.zeros(numel + len(weights), dtype=dtype, device=device)
        return self._buffer

    def _lost(self, what: str, error: Exception) -> str:
        return (
            f"trainer {self.rank} of {self.world_size} {what} the others: {str(error).splitlines()[0]}; if none of "
            "them failed first, look for a firewall between the machines"
        )
