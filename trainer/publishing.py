"""The adapter on its way to an engine on the same GPU: one buffer, exported once, filled anew at each publication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from posttrain.rl.fingerprint import checksum
from posttrain.rl.sharing import share
from posttrain.rl.types import SharedAdapter


class AdapterBuffer:
    """The adapter as the engine needs it: in its type, with alpha/rank folded into B. Never the trained weights
    themselves: a scaling folded into memory that is trained, too, would multiply from step to step.
    """

    def __init__(self, weights: Mapping[str, Tensor], scaling: float, dtype: torch.dtype) -> None:
        """Lay out ``weights`` (by PEFT's names) end to end in ``dtype``; every B is multiplied by ``scaling``."""
        self._scaling = scaling
        layout, size = [], 0
        for name, weight in weights.items():
            layout.append((name, size, tuple(weight.shape)))
            size += weight.numel()
        self._layout = tuple(layout)
        self._buffer = torch.empty(size, dtype=dtype, device=next(iter(weights.values())).device)
        self._handle = share(self._buffer)
        self._pairs: dict[str, tuple[list[Tensor], list[Tensor]]] = {"lora_A": ([], []), "lora_B": ([], [])}
        for name, start, shape in layout:
            views, sources = self._pairs[name.rsplit(".", 2)[1]]
            views.append(self._buffer[start : start + weights[name].numel()].view(shape))
            sources.append(weights[name].detach())

    @torch.no_grad()
    def publish(self, policy_version: int, config: Mapping[str, Any]) -> SharedAdapter:
        """Fill the buffer from the weights as they are now; when this returns, the device has done it."""
        torch._foreach_copy_(*self._pairs["lora_A"])
        views, sources = self._pairs["lora_B"]
        # Multiplied in the weights' own type, so that the engine's type is rounded to once.
        torch._foreach_copy_(views, torch._foreach_mul(sources, self._scaling))
        if self._buffer.is_cuda:
            torch.cuda.synchronize(self._buffer.device)
        return SharedAdapter(policy_version, config, self._handle, self._layout, checksum(self._buffer))
