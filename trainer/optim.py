"""From gradients to weights: schedules, clipping, AdamW in 32 or 8 bits, float32 masters of half-precision weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.rl.errors import CheckpointError, EngineError

if TYPE_CHECKING:
    from posttrain.rl.config import TrainerConfig
    from posttrain.rl.types import OptimParams


def learning_rate_at(step: int, total_steps: int, config: TrainerConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``total_steps``.

    The warm-up climbs linearly and reaches the full rate on its last step. Linear and cosine then fall from the full
    rate so as to be 0 one step after the last (no step is wasted on a rate of 0).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


class Optimizer:
    """AdamW over named weights. Half-precision weights (full fine-tuning) get a float32 master and gradient each:
    a bfloat16 weight swallows updates below 0.4% of itself, and gradients summed in bfloat16 depend on the split.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], config: TrainerConfig) -> None:
        self._weights = dict(weights)
        self._config = config
        self._masters: dict[str, nn.Parameter] = {}
        self._hooks = []
        for name, weight in self._weights.items():
            if weight.dtype in (torch.bfloat16, torch.float16):
                self._masters[name] = master = nn.Parameter(weight.detach().float())
                self._hooks.append(weight.register_post_accumulate_grad_hook(_move_gradient_to(master)))
        self._adam = self._build()

    def step(self, params: OptimParams) -> float:
        """Clip to ``max_grad_norm``, step, clear the gradients; returns the global norm before clipping.

        Raises ``EngineError`` naming the first weight whose gradient is not finite; then no weight has moved, and the
        gradients are cleared.
        """
        targets = self.targets()
        gradients = [weight.grad for weight in targets.values() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        if not math.isfinite(total := float(norm)):
            self._refuse(targets)
        if math.isfinite(params.max_grad_norm):
            torch.nn.utils.clip_grads_with_norm_(list(targets.values()), params.max_grad_norm, norm)
        for group in self._adam.param_groups:
            group["lr"], group["betas"], group["eps"] = params.learning_rate, params.betas, params.eps
            group["weight_decay"] = params.weight_decay
        self._adam.step()
        self._clear(targets)
        with torch.no_grad():
            for name, master in self._masters.items():
                self._weights[name].copy_(master)
        return total

    def reset(self) -> None:
        """Forget the moments; weights stay, masters are taken from them anew, gradients are cleared."""
        self.sync_masters()
        self._clear(self.targets())
        self._adam = self._build()

    def sync_masters(self) -> None:
        """Take the masters from the weights, after these were loaded from elsewhere."""
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(self._weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Kind, moments, masters and the order of the weights: tensors and plain values only."""
        return {
            "kind": self._config.optimizer,
            "names": list(self._weights),
            "adam": self._adam.state_dict(),
            "masters": {name: master.detach().clone() for name, master in self._masters.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo everything since the matching ``state_dict``. Raises ``CheckpointError`` where it does not fit."""
        if state["kind"] != self._config.optimizer:
            raise CheckpointError(
                f"written by trainer.optimizer = {state['kind']}, but this run has {self._config.optimizer}"
            )
        if list(state["names"]) != list(self._weights):
            changed = sorted(set(state["names"]) ^ set(self._weights))[:3]
            raise CheckpointError(
                f"the checkpoint's optimizer knows other weights: {', '.join(changed) or 'another order'}"
            )
        self._clear(self.targets())
        self._adam = self._build()
        self._adam.load_state_dict(state["adam"])
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(state["masters"][name] if name in state["masters"] else self._weights[name])

    def clear_gradients(self) -> None:
        """Forget every gradient."""
        self._clear(self.targets())

    def close(self) -> None:
        """Let go of the weights."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def targets(self) -> dict[str, nn.Parameter]:
        """What the gradients are on: the masters, where weights have them."""
        return {name: self._masters.get(name, weight) for name, weight in self._weights.items()}

    def _build(self) -> torch.optim.Optimizer:
        parameters = list(self.targets().values())
        settings: dict[str, Any] = {
            "lr": self._config.learning_rate,
            "betas": self._config.betas,
            "eps": self._config.eps,
        }
        settings["weight_decay"] = self._config.weight_decay
        if self._config.optimizer == "adamw":
            return torch.optim.AdamW(parameters, fused=True, **settings)
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise EngineError(
                "trainer.optimizer = adamw_8bit needs bitsandbytes: pip install 'posttrain[bnb]', or use adamw"
            ) from error
        return AdamW8bit(parameters, **settings)

    def _refuse(self, targets: Mapping[str, nn.Parameter]) -> None:
        name = next(
            name
            for name, weight in targets.items()
            if weight.grad is not None and not bool(torch.isfinite(weight.grad).all())
        )
        self._clear(targets)
        raise EngineError(
            f"the gradient of {name} is not finite; no weight was changed. Look for NaN in rewards or advantages, "
            "lower trainer.learning_rate, or use model.dtype = bfloat16 or float32 in place of float16"
        )

    def _clear(self, targets: Mapping[str, nn.Parameter]) -> None:
        for weight in (*self._weights.values(), *targets.values()):
            weight.grad = None


def _move_gradient_to(master: nn.Parameter) -> Any:
    """Hook that adds a weight's gradient to its master's and drops it, after each backward pass."""

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad += weight.grad
        weight.grad = None

    return hook
