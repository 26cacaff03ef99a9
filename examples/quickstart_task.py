"""The quick start's task: count on from a digit. ``3>`` asks for ``456``, ``8>`` for ``901``."""

from __future__ import annotations

import random

from posttrain import rl

DIGITS = "0123456789"


def count_on(start: int) -> str:
    """The three digits after ``start``, 0 after 9."""
    return "".join(str((start + step) % 10) for step in (1, 2, 3))


@rl.reward
def correct(completion: str, answer: str) -> float:
    """1 for exactly the right digits."""
    return float(completion == answer)


def problems() -> list[dict[str, str]]:
    """Every starting digit once."""
    return [{"prompt": f"{digit}>", "answer": count_on(int(digit))} for digit in DIGITS]


def demonstrations() -> list[dict[str, str]]:
    """Noisy ones: seven in ten have one wrong digit, so imitating them earns about 0.3."""
    noise = random.Random(0)
    rows = []
    for _ in range(400):
        start = noise.randrange(10)
        digits = list(count_on(start))
        if noise.random() < 0.7:
            place = noise.randrange(3)
            digits[place] = noise.choice([digit for digit in DIGITS if digit != digits[place]])
        rows.append({"prompt": f"{start}>", "completion": "".join(digits)})
    return rows
