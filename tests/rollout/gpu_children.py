"""Processes beside the engine's on the same GPU: one that maps its weights, one that publishes adapters to it."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from posttrain.rl.fingerprint import checksum
from posttrain.rl.sharing import opened, share
from posttrain.rl.types import SharedAdapter, SharedWeight


@contextmanager
def child(target: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """A spawned process that answers what is sent to it, until ``None``."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args))
    process.start()
    try:
        yield ours
        ours.send(None)
    finally:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert process.exitcode == 0


def map_weights(connection: Connection, payload: bytes) -> None:
    """Answers ``checksums``, ``allocated``, ``dequantized`` and ``flip`` (a byte of every tensor)."""
    torch.cuda.init()
    before = torch.cuda.memory_allocated()
    weights: dict[str, SharedWeight] = pickle.loads(payload)
    held = {name: {part: opened(t) for part, t in weight.tensors.items()} for name, weight in weights.items()}
    while (message := connection.recv()) is not None:
        if message == "checksums":
            answer: Any = {name: {part: checksum(t) for part, t in parts.items()} for name, parts in held.items()}
        elif message == "allocated":
            answer = torch.cuda.memory_allocated() - before
        elif message == "dequantized":
            answer = {name: _dequantized(weights[name], parts) for name, parts in held.items()}
        else:
            # Once an address: quantized weights may have one code book between them.
            for tensor in {t.data_ptr(): t for parts in held.values() for t in parts.values()}.values():
                tensor.view(-1).view(torch.uint8)[0].bitwise_xor_(255)
            torch.cuda.synchronize()
            answer = True
        connection.send(answer)


def _dequantized(weight: SharedWeight, parts: dict[str, Tensor]) -> Tensor:
    """The weight in float32 on the CPU, by hand."""
    parts = {name: tensor.cpu() for name, tensor in parts.items()}
    if weight.scheme == "dense":
        return parts["weight"].float()
    if weight.scheme == "fp8":
        return parts["weight"].float() * parts["scale"]
    packed = parts["weight"].view(-1).to(torch.int64)
    indices = torch.stack([packed >> 4, packed & 15], 1).view(-1)
    return (parts["code"][indices] * parts["absmax"].repeat_interleave(weight.block_size or 0)).view(weight.shape)


def publish(connection: Connection, dtype: torch.dtype) -> None:
    """Answers ``(version, config, tensors)`` with a pickled ``SharedAdapter``, always in the same buffer."""
    buffer = handle = None
    while (message := connection.recv()) is not None:
        version, config, tensors = message
        scaling = config["lora_alpha"] / config["r"]
        layout, flat = [], []
        for name, tensor in tensors.items():
            layout.append((name, sum(part.numel() for part in flat), tuple(tensor.shape)))
            flat.append((tensor * (scaling if ".lora_B." in name else 1.0)).to(dtype).reshape(-1))
        if buffer is None:
            buffer = torch.empty(sum(part.numel() for part in flat), dtype=dtype, device="cuda")
            handle = share(buffer)
        buffer.copy_(torch.cat(flat))
        torch.cuda.synchronize()
        assert handle is not None
        connection.send(pickle.dumps(SharedAdapter(version, config, handle, tuple(layout), checksum(buffer))))
