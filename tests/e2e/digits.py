"""A task a tiny model gets better at within a few steps: two digits after the given one."""

from __future__ import annotations

import random

from posttrain import rl


def answer_to(start: int) -> str:
    return f"{(start + 1) % 10}{(start + 2) % 10}"


@rl.reward
def digits(completion: str, answer: str) -> float:
    """Share of digits in their place, halved when the length is wrong."""
    right = sum(given == wanted for given, wanted in zip(completion, answer, strict=False)) / len(answer)
    return right if len(completion) == len(answer) else right / 2


@rl.reward(weight=0.25)
async def short(completion_ids: list[int]) -> float | None:
    """Does not apply to empty completions."""
    return float(len(completion_ids) <= 3) if len(completion_ids) > 1 else None


def problems() -> list[dict[str, str]]:
    return [{"prompt": f"{digit}>", "answer": answer_to(digit)} for digit in range(10)]


def demonstrations() -> list[dict[str, str]]:
    """Three in four are noise."""
    noise = random.Random(1)
    starts = [noise.randrange(10) for _ in range(60)]
    answers = [answer_to(s) if noise.random() < 0.25 else f"{noise.randrange(100):02d}" for s in starts]
    return [{"prompt": f"{s}>", "completion": a} for s, a in zip(starts, answers, strict=True)]
