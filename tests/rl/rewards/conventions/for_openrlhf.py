"""Signatures of OpenRLHF: ``reward_func`` of the file given to ``--remote_rm_url``."""

from __future__ import annotations

import torch

from posttrain.rl.rewards import reward
from tests.rl.rewards.conventions.case import CHAT, Case


@reward
def reward_func(queries, prompts, labels):
    """A dict of tensors; what follows the prompt in a query is the reply."""
    replies = [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]
    rewards = torch.tensor([float(reply == label) for reply, label in zip(replies, labels, strict=True)])
    return {"rewards": rewards, "scores": rewards.clamp(0, 1), "extra_logs": {"length": rewards * 0}}


@reward
def reward_func_tensor(queries, prompts, labels, **kwargs):
    """A tensor, as older versions take, with a column of one."""
    assert not kwargs
    return torch.tensor([[float(len(query) - len(prompt))] for query, prompt in zip(queries, prompts, strict=True)])


@reward
async def reward_func_async(queries, prompts, labels):
    """A list."""
    return [query.endswith(label) for query, label in zip(queries, labels, strict=True)]


TWO = ("42", "is 43")
CASES = [
    Case(reward_func, "openrlhf", TWO, [1.0, 0.0], {"label": "42"}),
    Case(reward_func, "openrlhf", TWO, [1.0, 0.0], {"answer": "42"}, CHAT),
    Case(reward_func_tensor, "openrlhf", TWO, [2.0, 5.0], {"label": "42"}),
    Case(reward_func_async, "openrlhf", TWO, [1.0, 0.0], {"label": "42"}),
]
