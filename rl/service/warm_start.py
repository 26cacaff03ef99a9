"""Supervised steps before the first rollout, on demonstrations, with the same learner and the same adapter."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from posttrain.rl.algorithms import parse
from posttrain.rl.batching import plan_supervised
from posttrain.rl.service.micro_batches import MicroBatchBudget
from posttrain.rl.types import OptimParams

if TYPE_CHECKING:
    from posttrain.rl.config import Config, WarmStartConfig
    from posttrain.rl.service.protocols import Learner

Example = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and completion ids."""


async def warm_start(
    config: Config, settings: WarmStartConfig, learner: Learner, examples: Sequence[Example], say: Callable[[str], None]
) -> dict[str, float]:
    """Minimise the cross-entropy of the completions; the optimizer forgets its moments at the end.

    Returns ``loss/warm_start``, the mean nats a token of the last tenth of the steps.
    """
    cross_entropy = parse("cross_entropy")
    order = random.Random(config.seed)
    params = OptimParams(settings.learning_rate, config.trainer.betas, max_grad_norm=config.trainer.max_grad_norm)
    budget = MicroBatchBudget(learner, config.trainer, say)
    deck: list[Example] = []
    losses: list[float] = []
    for step in range(1, settings.steps + 1):
        while len(deck) < settings.batch_size:
            deck += order.sample(list(examples), len(examples))
        drawn, deck = deck[: settings.batch_size], deck[settings.batch_size :]
        batches = plan_supervised(drawn, budget.tokens, config.rollout.max_tokens)
        figures = await budget.run(batches, partial(learner.forward_backward, algorithm=cross_entropy))
        await learner.optim_step(params)
        losses.append(figures["loss/total"].value())
        if step % max(1, settings.steps // 5) == 0:
            say(f"warm start {step}/{settings.steps}: cross-entropy {losses[-1]:.3f} nats a token")
    await learner.reset_optimizer()
    last = losses[-max(1, settings.steps // 10) :]
    return {"loss/warm_start": sum(last) / len(last)}
