"""Fingerprints: what the trainer published and what the engine holds must agree on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 22
"""Numbers summed at once: about 100 MiB of working memory, beside a KV cache that may have all the rest."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest over names, shapes, types and bytes, in name order; the device does not matter."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checksum(tensor: Tensor) -> str:
    """Hex digest of a tensor's bits, computed where it lies: two wrapping sums, the second weighted by position."""
    return checksums([tensor])[0]


def checksums(tensors: Sequence[Tensor]) -> list[str]:
    """``checksum`` of each, with one wait for the device."""
    import torch

    if not tensors:
        return []
    sums = torch.stack([_sums(tensor) for tensor in tensors]).cpu().tolist()
    return [f"{total % 2**64:016x}{weighted % 2**64:016x}" for total, weighted in sums]


def _sums(tensor: Tensor) -> Tensor:
    """Two wrapping int64 sums over the bits of a tensor: int64 [2]."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().view(-1).view(integers[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), _PIECE):
        part = flat[start : start + _PIECE].to(torch.int64)
        place = torch.arange(start, start + part.numel(), device=tensor.device) * 2654435761 + 1
        total += torch.stack([part.sum(), (part * place).sum()])
    return total
