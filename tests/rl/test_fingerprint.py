"""Checksums against sums of Python integers; fingerprints see names, shapes, types and bytes."""

from __future__ import annotations

import pytest
import torch

from posttrain.rl import fingerprint
from posttrain.rl.fingerprint import checksum, checksums

TYPES = {
    torch.uint8: 1,
    torch.float8_e4m3fn: 1,
    torch.bfloat16: 2,
    torch.float16: 2,
    torch.float32: 4,
    torch.float64: 8,
}


def sums_by_hand(tensor: torch.Tensor, size: int) -> str:
    """Both sums over the elements' bits as signed integers (bytes unsigned), modulo 2**64."""
    data = tensor.contiguous().view(torch.uint8).flatten().tolist()
    numbers = [int.from_bytes(bytes(data[i : i + size]), "little", signed=size > 1) for i in range(0, len(data), size)]
    total = sum(numbers) % 2**64
    weighted = sum(number * (place * 2654435761 + 1) for place, number in enumerate(numbers)) % 2**64
    return f"{total:016x}{weighted:016x}"


@pytest.mark.parametrize("dtype", TYPES)
def test_checksum_is_the_two_sums_whatever_the_pieces(dtype, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(7, 13, generator=generator).mul(9).to(dtype)
    expected = sums_by_hand(tensor, TYPES[dtype])
    assert checksum(tensor) == expected
    monkeypatch.setattr(fingerprint, "_PIECE", 10)
    assert checksums([tensor, tensor.T.contiguous().T]) == [expected, expected], "strides do not matter"


def test_a_flipped_bit_and_two_exchanged_numbers_are_seen() -> None:
    tensor = torch.arange(100, dtype=torch.float32)
    before = checksum(tensor)
    exchanged = tensor.clone()
    exchanged[[3, 70]] = exchanged[[70, 3]]
    assert checksum(exchanged) != before
    tensor.view(torch.uint8)[17] ^= 1
    assert checksum(tensor) != before
    assert checksums([]) == []


def test_a_fingerprint_sees_names_shapes_types_and_bytes_and_no_order() -> None:
    a, b = torch.arange(6.0), torch.ones(2)
    held = fingerprint.fingerprint({"a": a, "b": b})
    assert fingerprint.fingerprint({"b": b, "a": a.clone()}) == held
    others = [
        {"a": a.view(2, 3), "b": b},
        {"a": a, "c": b},
        {"a": a.view(torch.int32), "b": b},
        {"a": a + 1e-6, "b": b},
    ]
    assert len({held, *map(fingerprint.fingerprint, others)}) == 5
