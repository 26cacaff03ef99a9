"""The nouns every layer shares. Data only: no logic, and torch is named but never imported.

Shape letters: B sequences, T packed tokens (prompt and completion of every sequence, end to end, no padding).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]
Message = dict[str, Any]
"""One chat turn in the usual form: ``{"role": "user", "content": "…"}``."""


@dataclass(slots=True, frozen=True)
class Prompt:
    """One dataset row on its way through the loop."""

    id: str
    """Unique per occurrence (``"<epoch>-<row>"``); seeds of its samples are derived from it."""
    source: str | list[Message]
    """What the row held: plain text or chat messages. Rewards receive it as ``prompt``."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of the row; rewards receive them by name."""
    prompt_ids: tuple[int, ...] = ()
    """Token ids the sampler is given; the trainer trains on the same ids."""


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """How completions are drawn. ``top_p = 1``, ``top_k = 0`` and ``min_p = 0`` mean off; temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    """Base seed; an engine derives one seed a request from it, the prompt's id and the sample's index."""


@dataclass(slots=True, frozen=True)
class Completion:
    """One sample, exactly as the engine drew it."""

    completion_ids: tuple[int, ...]
    """Token ids as sampled, the stop token included when ``finish_reason`` is ``"stop"``."""
    rollout_logprobs: tuple[float, ...]
    """Log-probability of each sampled token under the distribution it was drawn from, temperature and truncation in."""
    text: str
    """Decoded without special tokens; what rewards see. Never re-encoded."""
    finish_reason: FinishReason
    policy_version: int
    """Version of the adapter that drew it (optimizer steps taken)."""


@dataclass(slots=True)
class Rollout:
    """A completion with its rewards and, once its group is complete, its advantage."""

    completion: Completion
    rewards: dict[str, float | None]
    """Raw score of each reward function; ``None`` where it does not apply."""
    reward: float
    """Weighted sum of what ``counted`` holds."""
    advantage: float = 0.0
    failures: Mapping[str, Literal["timeout", "error"]] = field(default_factory=dict)
    """Reward functions that gave no score of their own: they ran out of time, or failed in a way that is forgiven."""
    counted: Mapping[str, float | None] = field(default_factory=dict)
    """Score of each function that is part of the reward, clipped and gated."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of each of them, in the step the completion was scored for."""


@dataclass(slots=True)
class RolloutGroup:
    """All surviving samples of one prompt. Groups may be uneven."""

    prompt: Prompt
    rollouts: list[Rollout]


@dataclass(slots=True, frozen=True)
class Adapter:
    """Trained weights on their way to the engine and to disk."""

    policy_version: int
    kind: Literal["lora", "full"]
    """``lora``: PEFT's tensor names; ``full``: the model's own parameter names."""
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    """The content of ``adapter_config.json``; empty for ``full``."""


@dataclass(slots=True, frozen=True)
class SharedTensor:
    """A tensor on its way to another process of the same GPU, not copied; made and opened by ``rl.sharing``."""

    handle: Any
    """What rebuilds it: CUDA IPC arguments, or the tensor itself where it lies in main memory."""


@dataclass(slots=True, frozen=True)
class SharedWeight:
    """One frozen weight of the engine, under the name its transformers counterpart has."""

    scheme: Literal["dense", "nf4", "fp8"]
    tensors: Mapping[str, SharedTensor]
    """``dense``: ``weight``, in the transformers parameter's shape. ``nf4`` (bitsandbytes): ``weight`` uint8
    [bytes, 1], ``absmax`` float32 [blocks], ``code`` float32 [16]. ``fp8``: ``weight`` float8_e4m3fn [out, in], any
    strides, and ``scale`` float32, one number, [out, 1], or [⌈out/128⌉, ⌈in/128⌉]; the weight is their product."""
    shape: tuple[int, ...]
    """Of the transformers parameter."""
    checksums: Mapping[str, str]
    """``rl.fingerprint.checksum`` of each tensor, taken by the engine."""
    origin: str
    """The engine's own name, with the rows where it is a slice: for messages."""
    repacked: str | None = None
    """Why nobody else can use the engine's copy; ``tensors`` is empty then."""
    block_size: int | None = None
    """Weights under one absmax (nf4)."""
    activations: Literal["token", "group"] | None = None
    """How the engine rounds this layer's inputs to float8_e4m3fn (fp8): under one scale a token, or one for each 128
    inputs of a token; ``None``: not at all, or in a way that depends on the whole batch."""


SharedWeights = Mapping[str, SharedWeight]
"""By transformers parameter name. A tied head is left out."""


@dataclass(slots=True, frozen=True)
class SharedAdapter:
    """An adapter published through GPU memory."""

    policy_version: int
    config: Mapping[str, Any]
    """The content of ``adapter_config.json``."""
    buffer: SharedTensor
    """Every tensor end to end, in the engine's type, alpha/rank folded into B. Its owner overwrites it at the next
    publication, never while the engine reads."""
    layout: tuple[tuple[str, int, tuple[int, ...]], ...]
    """PEFT's name, offset into the buffer and shape of each tensor."""
    fingerprint: str
    """``rl.fingerprint.checksum`` of the buffer."""


Publication = Adapter | SharedAdapter
"""What a learner hands to a sampler: through host memory, or through the GPU they share."""


@dataclass(slots=True, frozen=True)
class TrainBatch:
    """One packed micro-batch. Position ``t`` of every ``[T]`` tensor speaks of token ``t`` itself:
    ``logprobs[t] = log p(input_ids[t] | the tokens of its sequence before t)``. A sequence's first token has none.
    """

    input_ids: Tensor
    """int64 [T]."""
    position_ids: Tensor
    """int64 [T], from 0 in each sequence."""
    cu_seqlens: Tensor
    """int32 [B + 1], cumulative lengths, first 0, last T."""
    loss_mask: Tensor
    """bool [T], true where the token is trained on. Never true on a sequence's first token."""
    advantages: Tensor
    """float32 [T], the sequence's advantage on each of its loss tokens, 0 elsewhere."""
    num_loss_tokens: int
    """Loss tokens of the WHOLE optimizer step: all micro-batches, all ranks."""
    num_sequences: int
    """Sequences with at least one loss token in the whole optimizer step."""
    num_micro_batches: int
    """Micro-batches of the whole optimizer step (BNPO alone needs it)."""
    max_tokens: int
    """Generation budget of a completion (Dr.GRPO's divisor)."""
    temperature: float = 1.0
    """The sampler's temperature: divides the trainer's logits too."""
    rollout_logprobs: Tensor | None = None
    """float32 [T], the sampler's."""
    old_logprobs: Tensor | None = None
    """float32 [T], the trainer's own before the first update of this step; absent when strictly on-policy."""
    ref_logprobs: Tensor | None = None
    """float32 [T], the base model's (adapter off)."""
    entropy_threshold: float | None = None
    """Entropy (nats) below which tokens are left out (top-entropy mask), over the whole step."""


@dataclass(slots=True, frozen=True)
class OptimParams:
    """What one optimizer step needs; the learning rate already follows its schedule."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Global gradient norm to clip to; ``inf`` turns clipping off."""


@dataclass(slots=True, frozen=True)
class OptimResult:
    """What one optimizer step did."""

    policy_version: int
    grad_norm: float
    """Global norm before clipping."""


@dataclass(slots=True, frozen=True)
class Scores:
    """What ``Learner.score`` returns for one micro-batch; both float32 [T], 0 outside the loss mask."""

    logprobs: Tensor
    entropy: Tensor
