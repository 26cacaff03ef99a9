"""The trainer's verbs: score, forward_backward, optim_step, export, save, load; ``Learner`` without the awaiting.

Shape letters: T packed tokens, S tokens in the loss.
"""

from __future__ import annotations

import gc
import hashlib
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from posttrain.rl import metrics
from posttrain.rl.algorithms.base import LossInputs
from posttrain.rl.errors import CheckpointError, EngineError, OutOfMemory
from posttrain.rl.fingerprint import checksums
from posttrain.rl.metrics import Mean, Metric
from posttrain.rl.types import Adapter, OptimParams, OptimResult, Publication, Scores, TrainBatch
from posttrain.trainer import checkpoint, lora
from posttrain.trainer.loss_scale import LossScale
from posttrain.trainer.model import PackedModel, load_causal_lm, resolve_device, resolve_kernels
from posttrain.trainer.optim import Optimizer
from posttrain.trainer.publishing import AdapterBuffer
from posttrain.trainer.shared_weights import HeldTensor, bind, frozen_tensors, storage_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from posttrain.rl.algorithms.base import Algorithm
    from posttrain.rl.config import ModelConfig, TrainerConfig
    from posttrain.rl.types import SharedWeights
    from posttrain.trainer.distributed import Ranks
    from posttrain.trainer.quantized import QuantizedLinear

Result = TypeVar("Result")


class Trainer:
    """Owns the trained weights and their optimizer. One thread at a time."""

    def __init__(  # noqa: PLR0913 — where it runs and what it shares, all by name
        self,
        source: str | Path,
        model: ModelConfig,
        trainer: TrainerConfig,
        *,
        seed: int = 0,
        shared: SharedWeights | None = None,
        memory_limit: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Load ``source`` (hub name or folder), or map ``shared``, and attach an adapter that ``seed`` decides.

        ``memory_limit``: bytes this process may allocate on the GPU; mapped memory does not count. Raises
        ``EngineError`` for what does not fit, ``OutOfMemory`` where it is the GPU's memory.
        """
        self.config = trainer
        self.device = resolve_device(trainer.device)
        self.kernels = resolve_kernels(trainer.kernels, self.device)
        if memory_limit is not None and self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory_limit / total), self.device)
        self._ranks = ranks
        self._shares = shared is not None
        self._mapped: dict[str, Tensor] = {}
        self._buffer: AdapterBuffer | None = None
        self.policy_version = 0
        what = "the trainer (end what else uses the GPU, or take a smaller model or trainer.lora.rank)"
        self._within(what, partial(self._build, source, model, shared, seed))
        self.release_memory()
        if ranks is not None:  # last: a trainer that cannot be built does not leave the others waiting for it
            ranks.connect(self.device)

    def _build(self, source: str | Path, model: ModelConfig, shared: SharedWeights | None, seed: int) -> None:
        trainer = self.config
        self._causal_lm = self._load(source, model, shared)
        self._model = PackedModel(self._causal_lm, self.device, self.kernels, share_prompts=trainer.share_prompts)
        if trainer.method == "lora":
            self._peft = lora.attach(self._causal_lm, trainer.lora, seed)
            self._weights = lora.weights(self._peft)
        else:
            self._peft = None
            self._weights = dict(self._causal_lm.named_parameters())
            for weight in self._weights.values():
                weight.requires_grad_(True)
        if self.kernels == "triton":
            from posttrain.trainer.fused import fuse  # imports triton

            fuse(self._model)
        if trainer.activation_checkpointing is True:  # auto has been settled by whoever knows what else needs memory
            self._model.enable_checkpointing(offload=trainer.offload_activations)
        self._loss_scale = LossScale() if self._causal_lm.dtype == torch.float16 else None
        self._optimizer = Optimizer(self._weights, trainer)

    def _load(self, source: str | Path, model: ModelConfig, shared: SharedWeights | None) -> PreTrainedModel:
        if self.config.method == "full" and (shared is not None or model.quantization != "none"):
            what = "weights shared with the engine" if shared is not None else f"{model.quantization} weights"
            raise EngineError(f'full fine-tuning cannot train {what}: use trainer.method = "lora"')
        if shared is None:
            return load_causal_lm(source, model, self.device)
        copy = self.config.copy_repacked_weights
        causal_lm, self._mapped = bind(source, model, shared, self.device, copy_repacked=copy)
        return causal_lm

    def score(self, batches: Sequence[TrainBatch], reference: bool = False) -> list[Scores]:
        """Logprobs and entropies of each micro-batch without gradients, on the host; ``reference``: adapter off.

        Raises ``EngineError`` for a reference under full fine-tuning: the base weights are gone.
        """
        if not reference:
            return self._scores(batches)
        if self._peft is None:
            raise EngineError(
                'full fine-tuning keeps no base model to refer to: use trainer.method = "lora" or kl_coef = 0'
            )
        with self._peft.disable_adapter():
            return self._scores(batches)

    def forward_backward(self, batches: Sequence[TrainBatch], algorithm: Algorithm) -> dict[str, Metric]:
        """Add the gradients of every micro-batch to what is there; never clears them. Returns the merged metrics.

        Raises ``OutOfMemory`` where a micro-batch does not fit; the gradients are then of no use: clear them.
        """
        parts = [self._within(_tokens(batch), partial(self._backward, batch, algorithm)) for batch in batches]
        return metrics.on_host(metrics.merge(parts))

    def optim_step(self, params: OptimParams) -> OptimResult:
        """Sum the gradients over the ranks, clip, step, clear them; the policy version grows by one.

        Raises ``EngineError`` naming the first weight with a gradient that is not finite; then nothing was stepped.
        """
        grad_norm = self._within("the optimizer step", partial(self._step, params))
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
        """The trained weights for the sampler: through the GPU's memory where the base came that way, else a copy."""
        if not self._shares:
            return self.export_adapter()
        assert self._peft is not None
        if self._buffer is None:
            self._buffer = AdapterBuffer(self._weights, lora.scaling(self._peft), self._causal_lm.dtype)
        return self._buffer.publish(self.policy_version, lora.adapter_config(self._peft))

    def clear_gradients(self) -> None:
        """Forget the gradients since the last optimizer step."""
        self._optimizer.clear_gradients()

    def base_weights(self) -> dict[str, Tensor | QuantizedLinear]:
        """Frozen base parameters, not copied, by their plain transformers names; a quantized linear layer is there as
        a module, under the module's name. Empty for full fine-tuning.
        """
        if self._peft is None:
            return {}
        base = lora.base_weights(self._causal_lm)
        return {name: held.detach() if isinstance(held, Tensor) else held for name, held in base.items()}

    def checksum(self) -> str:
        """Checksum of the frozen base, quantization state included, computed where it lies; empty for full tuning."""
        if self._peft is None:
            return ""
        base = frozen_tensors(self._causal_lm)
        digest = hashlib.blake2b("\n".join(base).encode(), digest_size=16)
        digest.update("".join(checksums(list(base.values()))).encode())
        return digest.hexdigest()

    def storage_report(self) -> list[HeldTensor]:
        """Where each frozen tensor lies, and whether it is the engine's memory."""
        return storage_report(self._causal_lm, self._mapped)

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
        """Of the GPU: peak since the last call, and what is allocated and reserved now. Else this process's peak."""
        if self.device.type != "cuda":
            return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        figures = {"peak_memory_gib": peak, "allocated_gib": allocated, "reserved_gib": reserved}
        return {name: figure / 2**30 for name, figure in figures.items()}

    def release_memory(self) -> None:
        """Give cached memory and cuBLAS's workspace back to the GPU, for the engine to wake into."""
        if self.device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Release everything; safe to call twice."""
        if not hasattr(self, "_model"):
            return
        if self._ranks is not None:
            self._ranks.close()
        self._optimizer.close()
        del self._model, self._causal_lm, self._peft, self._weights, self._optimizer, self._mapped, self._buffer
        gc.collect()
        self.release_memory()
        if self.device.type == "cuda":
            torch._C._host_emptyCache()  # torch keeps pinned memory that nobody uses, too

    def _within(self, what: str, work: Callable[[], Result]) -> Result:
        """Do ``work``; where the GPU's memory does not suffice for ``what``, give back what it held and raise
        ``OutOfMemory``.
        """
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Only here are the frames of the failed work gone, and with them the tensors that they held.
        gc.collect()
        self.release_memory()
        raise OutOfMemory(f"the GPU's memory does not suffice for {what}: {reason}")

    def _backward(self, batch: TrainBatch, algorithm: Algorithm) -> Mapping[str, Metric]:
        run = partial(self._gradients, batch, algorithm)
        if self._loss_scale is None:
            return run(1.0)
        return self._loss_scale.backward(list(self._optimizer.targets().values()), run)

    def _gradients(self, batch: TrainBatch, algorithm: Algorithm, loss_scale: float) -> Mapping[str, Metric]:
        given = self._on_device(batch)  # first: a copy from the host waits for everything that the GPU was told before
        logprobs, entropy = self._logprobs(batch, entropy_gradient=algorithm.needs_entropy_gradient)
        inputs = _loss_inputs(given, logprobs, entropy)
        output = algorithm.loss(inputs)
        if output.loss.requires_grad:  # a loss without any token may be a plain 0
            (output.loss * loss_scale).backward()
        counted = torch.where(inputs.loss_mask, entropy.detach(), torch.zeros_like(entropy)).sum()
        return {**output.metrics, "policy/entropy": Mean(counted, inputs.loss_mask.sum())}

    def _step(self, params: OptimParams) -> float:
        if self._ranks is not None:
            self._ranks.sum_gradients(self._optimizer.targets())
        return self._optimizer.step(params)

    @torch.no_grad()
    def _scores(self, batches: Sequence[TrainBatch]) -> list[Scores]:
        work = [partial(self._logprobs, batch, entropy_gradient=False) for batch in batches]
        found = [self._within(_tokens(batch), score) for batch, score in zip(batches, work)]
        return [Scores(logprobs.cpu(), entropy.cpu()) for logprobs, entropy in found]  # the GPU has all its work by now

    def _logprobs(self, batch: TrainBatch, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies [T], 0 outside the loss; only tokens in the loss reach the head."""
        assert not batch.loss_mask[batch.cu_seqlens[:-1].long()].any(), "a first token has no logprob"
        positions = batch.loss_mask.nonzero().squeeze(1)
        places = positions.to(self.device)
        logprobs, entropy = self._model.logprobs(
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            positions,
            temperature=batch.temperature,
            entropy_gradient=entropy_gradient,
        )
        zeros = logprobs.new_zeros(batch.loss_mask.shape)
        return zeros.index_copy(0, places, logprobs), zeros.index_copy(0, places, entropy)

    def _on_device(self, batch: TrainBatch) -> TrainBatch:
        """What a loss asks for, beside the trainer's own logprobs."""
        names = ("advantages", "loss_mask", "cu_seqlens", "old_logprobs", "ref_logprobs", "rollout_logprobs")
        tensors = {name: getattr(batch, name) for name in names}
        return replace(batch, **{name: t.to(self.device) for name, t in tensors.items() if t is not None})


def _loss_inputs(batch: TrainBatch, logprobs: Tensor, entropy: Tensor) -> LossInputs:
    def like(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(logprobs.dtype)

    return LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs.to(logprobs.dtype),
        advantages=batch.advantages.to(logprobs.dtype),
        loss_mask=batch.loss_mask,
        cu_seqlens=batch.cu_seqlens,
        num_loss_tokens=batch.num_loss_tokens,
        num_sequences=batch.num_sequences,
        num_micro_batches=batch.num_micro_batches,
        max_tokens=batch.max_tokens,
        ref_logprobs=like(batch.ref_logprobs),
        rollout_logprobs=like(batch.rollout_logprobs),
        entropy=entropy,
        entropy_threshold=batch.entropy_threshold,
    )


def _tokens(batch: TrainBatch) -> str:
    return f"a micro-batch of {len(batch.input_ids)} tokens"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU's memory ran out: in torch's allocator, or in a library beside it."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        mark in str(error) for mark in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
