"""Every loss a second time, as plain Python loops over sequences written from the papers; nothing shared with ours.

``Sample`` holds one completion as lists of floats. The losses take the log-probabilities twice: ``lp`` is what is
differentiated, ``frozen`` stands wherever the paper stops the gradient. Central differences in ``lp`` alone are then
the true gradient, stop-gradients included.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

from posttrain.rl.algorithms import LossInputs

Rows = list[list[float]]


@dataclass
class Sample:
    """One sequence: a prompt of ``prompt`` tokens, then one entry a completion token."""

    prompt: int
    mask: list[bool]
    lp: list[float]
    old: list[float]
    mu: list[float]
    ref: list[float]
    entropy: list[float]
    advantage: float

    @property
    def n(self) -> int:
        return sum(self.mask)


def samples(lengths: list[int], seed: int, *, drift: float = 0.5, holes: bool = True) -> list[Sample]:
    """Random completions of these lengths; with ``holes`` some inner tokens are masked."""
    rng = random.Random(seed)
    result = []
    for index, length in enumerate(lengths):
        mask = [not holes or length < 3 or rng.random() > 0.25 for _ in range(length)]
        mask[rng.randrange(length)] = True
        old = [-rng.uniform(0.05, 3.0) for _ in range(length)]
        near = [[min(o + rng.uniform(-drift, drift), -0.01) for o in old] for _ in range(3)]
        entropy = [rng.uniform(0.1, 2.0) for _ in range(length)]
        advantage = rng.uniform(0.2, 1.5) * (1 if index % 2 else -1)
        result.append(Sample(rng.randrange(1, 4), mask, near[0], old, near[1], near[2], entropy, advantage))
    return result


def pack(rows: list[Sample], garbage: float = float("nan"), **counts: int) -> LossInputs:
    """One micro-batch of these sequences in fp64; ``garbage`` stands at every masked position."""

    def column(name: str) -> torch.Tensor:
        flat: list[float] = []
        for row in rows:
            values = [row.advantage] * len(row.lp) if name == "advantage" else getattr(row, name)
            flat += [garbage] * row.prompt
            flat += [value if keep else garbage for value, keep in zip(values, row.mask, strict=True)]
        return torch.tensor(flat, dtype=torch.float64)

    bounds = [0]
    for row in rows:
        bounds.append(bounds[-1] + row.prompt + len(row.lp))
    return LossInputs(
        logprobs=column("lp").requires_grad_(),
        old_logprobs=column("old"),
        advantages=column("advantage"),
        loss_mask=torch.tensor([keep for row in rows for keep in [False] * row.prompt + row.mask]),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        num_loss_tokens=counts.get("num_loss_tokens", sum(row.n for row in rows)),
        num_sequences=counts.get("num_sequences", sum(row.n > 0 for row in rows)),
        num_micro_batches=counts.get("num_micro_batches", 1),
        max_tokens=counts.get("max_tokens", 10),
        ref_logprobs=column("ref"),
        rollout_logprobs=column("mu"),
        entropy=column("entropy").requires_grad_(),
    )


def clamp(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


def ppo(ratio: float, a: float, low: float, high: float) -> float:
    return -min(ratio * a, clamp(ratio, 1 - low, 1 + high) * a)


def token_losses(name: str, row: Sample, lp: list[float], frozen: list[float]) -> list[float]:
    """The loss of each loss token of one sequence, before any division, at the papers' defaults."""
    a = row.advantage
    keep = [t for t in range(len(row.lp)) if row.mask[t]]
    n = len(keep)
    lp, frozen = [lp[t] for t in keep], [frozen[t] for t in keep]
    old, mu = [row.old[t] for t in keep], [row.mu[t] for t in keep]
    if name in ("gspo", "luspo"):
        s = math.exp(sum(x - o for x, o in zip(lp, old, strict=True)) / n)
        low, high = (3e-4, 4e-4) if name == "gspo" else (2e-3, 2.5e-3)
        return [ppo(s, a, low, high)] * n
    if name == "gspo_token":
        s = math.exp(sum(x - o for x, o in zip(frozen, old, strict=True)) / n)
        return [ppo(s * math.exp(x) / math.exp(f), a, 3e-4, 4e-4) for x, f in zip(lp, frozen, strict=True)]
    if name == "gmpo":
        product = 1.0
        for x, o in zip(lp, old, strict=True):
            ratio = math.exp(x - o)
            product *= min(ratio, math.exp(0.4)) if a > 0 else max(ratio, math.exp(-0.4))
        return [-a * product ** (1 / n)] * n
    if name == "vespo":
        w = clamp(math.prod(math.exp(f - m) for f, m in zip(frozen, mu, strict=True)), 1e-8, math.exp(20))
        k, lam = (2, 3) if a >= 0 else (3, 2)
        phi = math.exp(lam) * w**k * math.exp(-lam * w)
        return [-phi * a * x for x in lp]
    losses = []
    for x, f, o, m in zip(lp, frozen, old, mu, strict=True):
        ratio = math.exp(x - o)
        if name == "cispo":
            losses.append(-min(math.exp(f - o), 5.0) * a * x)
        elif name == "sapo":
            tau = 1.0 if a > 0 else 1.05
            losses.append(-(4 / tau) / (1 + math.exp(-tau * (ratio - 1))) * a)
        elif name == "dppo":
            p, q = math.exp(f), math.exp(m)
            inside = p - q <= 0.2 if a > 0 else p - q >= -0.2
            losses.append(-min(p / q, 20.0) * a * x if inside else 0.0)
        elif name == "cross_entropy":
            losses.append(-a * x)
        else:
            losses.append(ppo(ratio, a, 0.2, 0.28 if name == "dapo" else 0.2))
    return losses


SEQUENCE_MEAN = {"grpo", "gspo", "gspo_token", "sapo", "gmpo", "gdpo"}


def step_loss(name: str, rows: list[Sample], lp: Rows, frozen: Rows, max_tokens: int = 10) -> float:
    """The loss of a whole optimizer step."""
    losses = [token_losses(name, row, lp[i], frozen[i]) for i, row in enumerate(rows) if row.n]
    n, b = sum(len(row) for row in losses), len(losses)
    total = sum(sum(row) for row in losses)
    if name in SEQUENCE_MEAN:
        return sum(sum(row) / len(row) for row in losses) / b
    if name == "dr_grpo":
        return total / (b * max_tokens)
    if name == "luspo":
        return total / b
    return total / n


def step_gradient(name: str, rows: list[Sample], h: float = 1e-6) -> Rows:
    """Central differences of ``step_loss`` in every loss token; 0 at masked ones."""
    frozen = [row.lp for row in rows]
    gradient = [[0.0] * len(row.lp) for row in rows]
    for i, row in enumerate(rows):
        for t, keep in enumerate(row.mask):
            if keep:
                up, down = [list(x) for x in frozen], [list(x) for x in frozen]
                up[i][t] += h
                down[i][t] -= h
                gradient[i][t] = (step_loss(name, rows, up, frozen) - step_loss(name, rows, down, frozen)) / (2 * h)
    return gradient
