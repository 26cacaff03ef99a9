"""The trainer's verbs: score, forward_backward, optim_step, export, save, load; ``Learner`` without the awaiting.

Shape letters: T packed tokens, S tokens in the loss.
"""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain.rl import metrics
from posttrain.rl.algorithms.base import LossInputs
from posttrain.rl.errors import CheckpointError, EngineError
from posttrain.rl.metrics import Mean, Metric
from posttrain.rl.types import Adapter, OptimParams, OptimResult, Publication, Scores, TrainBatch
from posttrain.trainer import checkpoint, lora
from posttrain.trainer.model import PackedModel, load_causal_lm, resolve_device
from posttrain.trainer.optim import Optimizer

if TYPE_CHECKING:
    from posttrain.rl.algorithms.base import Algorithm
    from posttrain.rl.config import ModelConfig, TrainerConfig

FLOAT16_LOSS_SCALE = 4096.0
"""Token losses are divided by the step's token count; in float16 their gradients would underflow without it."""


class Trainer:
    """Owns the trained weights and their optimizer. One thread at a time."""

    def __init__(self, source: str | Path, model: ModelConfig, trainer: TrainerConfig, *, seed: int = 0) -> None:
        """Load ``source`` (hub name or folder) and attach an adapter whose initial weights ``seed`` decides."""
        self.config = trainer
        self.device = resolve_device(trainer.device)
        self._causal_lm = load_causal_lm(source, model, self.device)
        self._model = PackedModel(self._causal_lm, self.device)
        if trainer.method == "lora":
            self._peft = lora.attach(self._causal_lm, trainer.lora, seed)
            self._weights = lora.weights(self._peft)
        else:
            self._peft = None
            self._weights = dict(self._causal_lm.named_parameters())
            for weight in self._weights.values():
                weight.requires_grad_(True)
        if trainer.activation_checkpointing:
            self._model.enable_checkpointing()
        self._loss_scale = FLOAT16_LOSS_SCALE if self._causal_lm.dtype == torch.float16 else 1.0
        self._optimizer = Optimizer(self._weights, trainer, self._loss_scale)
        self.policy_version = 0

    def score(self, batches: Sequence[TrainBatch], reference: bool = False) -> list[Scores]:
        """Logprobs and entropies of each micro-batch without gradients, on the host; ``reference``: adapter off.

        Raises ``EngineError`` for a reference under full fine-tuning: the base weights are gone.
        """
        if not reference:
            return [self._score(batch) for batch in batches]
        if self._peft is None:
            raise EngineError(
                'full fine-tuning keeps no base model to refer to: use trainer.method = "lora" or kl_coef = 0'
            )
        with self._peft.disable_adapter():
            return [self._score(batch) for batch in batches]

    def forward_backward(self, batches: Sequence[TrainBatch], algorithm: Algorithm) -> dict[str, Metric]:
        """Add the gradients of every micro-batch to what is there; never clears them. Returns the merged metrics."""
        parts: list[Mapping[str, Metric]] = []
        for batch in batches:
            logprobs, entropy = self._logprobs(batch, entropy_gradient=algorithm.needs_entropy_gradient)
            inputs = self._loss_inputs(batch, logprobs, entropy)
            output = algorithm.loss(inputs)
            if output.loss.requires_grad:  # a loss without any token may be a plain 0
                (output.loss * self._loss_scale).backward()
            counted = torch.where(inputs.loss_mask, entropy.detach(), torch.zeros_like(entropy)).sum()
            parts.append({**output.metrics, "policy/entropy": Mean(counted, inputs.loss_mask.sum())})
        return metrics.merge(parts)

    def optim_step(self, params: OptimParams) -> OptimResult:
        """Clip, step, clear the gradients; the policy version grows by one.

        Raises ``EngineError`` naming the first weight with a gradient that is not finite; then nothing was stepped.
        """
        grad_norm = self._optimizer.step(params)
        self.policy_version += 1
        return OptimResult(self.policy_version, grad_norm)

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments (after a supervised warm start)."""
        self._optimizer.reset()

    def export_adapter(self) -> Adapter:
        """A copy of the trained weights on the host."""
        tensors = {name: weight.detach().to("cpu", copy=True) for name, weight in self._weights.items()}
        if self._peft is None:
            return Adapter(self.policy_version, "full", tensors, {})
        return Adapter(self.policy_version, "lora", tensors, lora.adapter_config(self._peft))

    def publish_adapter(self) -> Publication:
        """The trained weights for the sampler: see ``Learner.publish_adapter``."""
        return self.export_adapter()

    def clear_gradients(self) -> None:
        """Forget the gradients since the last optimizer step."""
        for weight in self._weights.values():
            weight.grad = None

    def base_weights(self) -> dict[str, Tensor]:
        """Frozen base parameters, not copied, by their plain transformers names; empty for full fine-tuning."""
        if self._peft is None:
            return {}
        return {name: weight.detach() for name, weight in lora.base_weights(self._causal_lm).items()}

    def checksum(self) -> str:
        """Checksum of the frozen base weights, computed where they lie; empty for full fine-tuning."""
        base = self.base_weights()
        if not base:
            return ""
        sums = torch.stack([_sums(weight) for weight in base.values()]).cpu()
        digest = hashlib.blake2b("\n".join(base).encode(), digest_size=16)
        digest.update(sums.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write weights, optimizer, version and random state into an existing folder."""
        if self._peft is None:
            checkpoint.save_model(folder, self._causal_lm)
        else:
            checkpoint.save_adapter(folder, self._weights, lora.adapter_config(self._peft))
        state = {
            "method": self.config.method,
            "policy_version": self.policy_version,
            "optimizer": self._optimizer.state_dict(),
            "random": checkpoint.random_state(),
        }
        checkpoint.save_state(folder, state)

    def load(self, folder: Path) -> None:
        """Undo everything since the matching ``save``. Raises ``CheckpointError`` where it does not fit this run."""
        state = checkpoint.load_state(folder)
        if state["method"] != self.config.method:
            raise CheckpointError(
                f"{folder}: written by trainer.method = {state['method']}, this run has {self.config.method}"
            )
        self.load_weights(folder)
        self._optimizer.load_state_dict(state["optimizer"])
        self.policy_version = int(state["policy_version"])
        checkpoint.restore_random_state(state["random"])

    def load_weights(self, folder: Path) -> None:
        """Start from weights alone, such as an adapter that peft saved; the optimizer starts afresh."""
        if self._peft is None:
            checkpoint.load_model(folder, self._weights, self._causal_lm.dtype)
        else:
            checkpoint.load_adapter(folder, self._weights, lora.adapter_config(self._peft))
        self._optimizer.reset()

    def memory(self) -> dict[str, float]:
        """Peak memory: of the GPU since the last call, or of this process since its start."""
        if self.device.type != "cuda":
            return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"peak_memory_gib": peak}

    def close(self) -> None:
        """Release everything; safe to call twice."""
        if not hasattr(self, "_model"):
            return
        self._optimizer.close()
        del self._model, self._causal_lm, self._peft, self._weights, self._optimizer
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _score(self, batch: TrainBatch) -> Scores:
        logprobs, entropy = self._logprobs(batch, entropy_gradient=False)
        return Scores(logprobs.cpu(), entropy.cpu())

    def _logprobs(self, batch: TrainBatch, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies [T], 0 outside the loss; only tokens in the loss reach the head."""
        mask = batch.loss_mask.to(self.device)
        assert not mask[batch.cu_seqlens[:-1].long().to(self.device)].any(), "a first token has no logprob"
        positions = mask.nonzero().squeeze(1)
        logprobs, entropy = self._model.logprobs(
            batch.input_ids.to(self.device),
            batch.position_ids.to(self.device),
            batch.cu_seqlens,
            positions,
            temperature=batch.temperature,
            entropy_gradient=entropy_gradient,
        )
        zeros = logprobs.new_zeros(mask.shape)
        return zeros.index_copy(0, positions, logprobs), zeros.index_copy(0, positions, entropy)

    def _loss_inputs(self, batch: TrainBatch, logprobs: Tensor, entropy: Tensor) -> LossInputs:
        def like(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(self.device, logprobs.dtype)

        old_logprobs = like(batch.old_logprobs)
        return LossInputs(
            logprobs=logprobs,
            old_logprobs=logprobs.detach() if old_logprobs is None else old_logprobs,
            advantages=batch.advantages.to(self.device, logprobs.dtype),
            loss_mask=batch.loss_mask.to(self.device),
            cu_seqlens=batch.cu_seqlens.to(self.device),
            num_loss_tokens=batch.num_loss_tokens,
            num_sequences=batch.num_sequences,
            num_micro_batches=batch.num_micro_batches,
            max_tokens=batch.max_tokens,
            ref_logprobs=like(batch.ref_logprobs),
            rollout_logprobs=like(batch.rollout_logprobs),
            entropy=entropy,
            entropy_threshold=batch.entropy_threshold,
        )


def _sums(tensor: Tensor) -> Tensor:
    """Two wrapping int64 sums over the bits of a tensor, the second weighted by position: int64 [2]."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.contiguous().view(-1).view(integers[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, flat.numel(), 1 << 24):
        part = flat[start : start + (1 << 24)].to(torch.int64)
        place = torch.arange(start, start + part.numel(), device=tensor.device) * 2654435761 + 1
        total += torch.stack([part.sum(), (part * place).sum()])
    return total
