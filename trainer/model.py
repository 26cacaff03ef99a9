"""A transformers causal LM as the trainer sees it: packed tokens in, log-probabilities out, no logits in between.

Shape letters: T packed tokens, S scored tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.kernels import reference
from posttrain.kernels.launch import runs_triton
from posttrain.kernels.reference.attention import Segments
from posttrain.rl.errors import EngineError
from posttrain.rl.machine import dtype_name
from posttrain.trainer.attention import NAME as PACKED_ATTENTION
from posttrain.trainer.attention import Kernels, Packing
from posttrain.trainer.offload import checkpoint_layers
from posttrain.trainer.quantized import quantize_linears
from posttrain.trainer.shared_prompts import lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from posttrain.rl.config import ModelConfig

log = logging.getLogger(__name__)

PACKABLE_LAYERS = {"full_attention", "sliding_attention", "attention"}
PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Nats by which our logprobs may differ from the model's own; half precision is allowed 0.5."""
HALF_HIDDEN_TOLERANCE = 0.25
"""Relative distance allowed between hidden states in half precision (SmolLM2 in bfloat16: 0.02 to 0.06)."""
SHARING_TOLERANCE = 1e-3
"""Relative distance allowed between hidden states with a shared prompt and without, in single and double precision."""


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises ``EngineError`` for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "trainer.device = cuda, but torch sees no GPU: use auto or cpu, or install a CUDA build of torch"
        )
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def resolve_kernels(name: str, device: torch.device) -> Kernels:
    """``auto`` is triton where it runs on ``device``. Raises ``EngineError`` for triton where it cannot."""
    if name == "reference" or (name == "auto" and not runs_triton(device)):
        return "reference"
    if not runs_triton(device):
        raise EngineError(
            f"trainer.kernels = triton, but Triton does not run on {device}: it needs the triton package and an NVIDIA "
            "GPU of compute capability 7.5 or more (on a CPU, TRITON_INTERPRET=1 interprets it, slowly): use auto"
        )
    return "triton"


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """torch's type for ``model.dtype`` on a device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return getattr(torch, dtype_name(name, capability))


@dataclass(frozen=True)
class HeadSettings:
    """What the architecture does to the head's output: ``logits = softcap·tanh(scale·z / softcap)``."""

    softcap: float | None
    scale: float | None


class PackedModel:
    """Backbone and head of a causal LM, run on packed sequences. In evaluation mode throughout: no dropout."""

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        device: torch.device,
        kernels: Kernels = "reference",
        *,
        share_prompts: bool = False,
    ) -> None:
        """Raises ``EngineError`` where our logprobs would not be the model's own."""
        self.causal_lm = causal_lm
        self.device = device
        self.kernels: Kernels = kernels
        self._token_logprobs = reference.token_logprobs
        if kernels == "triton":
            from posttrain.kernels.token_logprobs import token_logprobs

            self._token_logprobs = token_logprobs
        self.head = causal_lm.get_output_embeddings()
        if self.head is None or getattr(self.head, "weight", None) is None:
            raise EngineError(f"{type(causal_lm).__name__} has no output head to score tokens with: is it a causal LM?")
        self.backbone: nn.Module = causal_lm.get_decoder()
        self.settings = _head_settings(causal_lm.config)
        causal_lm.eval()
        self._rope_limit = _rope_limit(causal_lm.config)
        self._own_attention = causal_lm.config.get_text_config()._attn_implementation
        self.packs = self.shares = False
        self.packs = self._try_packing()
        self._check_logprobs()
        if share_prompts and self.packs:
            self._check_sharing()
        elif share_prompts:
            log.warning("prompts are not shared: sequences that are run one at a time each compute their own")
        self.shares = share_prompts and self.packs

    def enable_checkpointing(self, *, offload: bool = False) -> None:
        """Recompute each decoder layer in the backward pass; with ``offload`` their inputs wait in host memory. The
        gradients are the same.
        """
        checkpoint_layers(self.backbone, self.device, offload=offload)

    def logprobs(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, positions: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Log-probability [S] of the tokens at ``positions`` given what stands before them, and the entropy there.

        Packed sequences, and ascending positions; best on the host. ``options``: ``temperature``, ``entropy_gradient``,
        ``chunk`` of ``kernels.token_logprobs``.
        """
        targets = input_ids[positions].to(self.device)
        rows = self.hidden(input_ids, position_ids, cu_seqlens, positions)
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        return self._token_logprobs(
            rows, weight, targets, bias=bias, softcap=self.settings.softcap, scale=self.settings.scale, **options
        )

    def hidden(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, positions: Tensor) -> Tensor:
        """The last hidden states [S, H] that predict the tokens at ``positions``; no token sees another sequence."""
        longest = int(cu_seqlens.diff().max())
        together = self.packs and (self._rope_limit is None or longest <= self._rope_limit)
        layout = lay_out(input_ids, cu_seqlens, positions, share=self.shares and together)
        if not layout.lengths:
            return self.head.weight.new_zeros(0, self.head.weight.shape[1])
        ids, places = (column[layout.tokens.to(column.device)].to(self.device) for column in (input_ids, position_ids))
        rows = layout.rows.to(self.device)  # before the layers: a copy from the host waits for what the GPU was told
        if together:
            hidden = self._run(ids, places, self._packing(layout.lengths, layout.prompts))
        else:
            parts = zip(ids.split(layout.lengths), places.split(layout.lengths), strict=True)
            hidden = torch.cat([self._run(own, place, self._packing([len(own)])) for own, place in parts])
        return hidden[rows]

    def _packing(self, lengths: Sequence[int], prompts: Sequence[int] | None = None) -> Packing:
        return Packing(Segments.of(lengths, prompts, self.device), self.kernels)

    def _run(self, input_ids: Tensor, position_ids: Tensor, packing: Packing) -> Tensor:
        extra = {"packing": packing} if self.packs else {}
        output = self.backbone(
            input_ids=input_ids.unsqueeze(0), position_ids=position_ids.unsqueeze(0), use_cache=False, **extra
        )
        return output.last_hidden_state.squeeze(0)

    def _try_packing(self) -> bool:
        """Switch to packed attention and make sure, on two short sequences, that nothing leaks between them."""
        name, config = type(self.causal_lm).__name__, self.causal_lm.config.get_text_config()
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not layers <= PACKABLE_LAYERS or not self.causal_lm._supports_attention_backend:
            log.warning("%s cannot be packed (%s): sequences are run one at a time", name, ", ".join(sorted(layers)))
            return False
        self.causal_lm.set_attn_implementation(PACKED_ATTENTION)
        self.packs = True
        try:
            if not self._leaks():
                return True
            log.warning("%s mixes packed sequences: they are run one at a time", name)
        except (EngineError, TypeError) as error:
            log.warning("%s cannot be packed (%s): sequences are run one at a time", name, error)
        self.causal_lm.set_attn_implementation(self._own_attention)
        return False

    @torch.no_grad()
    def _leaks(self) -> bool:
        """Whether the second of two packed sequences changes when the first one does."""
        ids = torch.tensor([0, 1, 2, 3, 1, 2, 3, 0], device=self.device)
        positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3], device=self.device)
        packing = self._packing([4, 4])
        one = self._run(ids, positions, packing)[4:]
        two = self._run(torch.cat([ids[:4].flip(0), ids[4:]]), positions, packing)[4:]
        return (one - two).abs().max().item() > 1e-3 * one.abs().max().item()

    @torch.no_grad()
    def _check_logprobs(self) -> None:
        """Compare with the model run in its own way on a few tokens: nothing unknown, in its attention or after its
        head, may pass unnoticed. Its eager attention is the definition; others leave things out (Gemma 2's softcap).

        In half precision a forward pass through another attention moves unlikely tokens by a nat or more, so there the
        head is compared over the very same hidden states, and the attention by the hidden states it leads to.
        """
        ids = self._probe()
        positions, cu_seqlens = torch.arange(len(ids), device=self.device), torch.tensor([0, len(ids)])
        ours, _ = self.logprobs(ids, positions, cu_seqlens, positions[1:])
        half = self.head.weight.dtype not in PROBE_TOLERANCE
        packed = {"packing": self._packing([len(ids)])} if self.packs else {}
        if half:
            logits = self.causal_lm(input_ids=ids[None], position_ids=positions[None], use_cache=False, **packed).logits
            hidden = self.hidden(ids, positions, cu_seqlens, positions[1:]).float()
        with self._eager_attention():
            if half:
                own = self.backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1].float()
                distance = ((hidden - own).norm() / own.norm()).item()
            else:
                logits, distance = self.causal_lm(input_ids=ids[None], use_cache=False).logits, 0.0
        theirs = logits[0, :-1].to(ours.dtype).log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        gap = (ours - theirs).abs().max().item()
        if not (gap <= PROBE_TOLERANCE.get(self.head.weight.dtype, 0.5) and distance <= HALF_HIDDEN_TOLERANCE):
            raise EngineError(
                f"{type(self.causal_lm).__name__}: the trainer's logprobs differ from the model's own by {gap:.3g} "
                f"nats and its hidden states by {distance:.1%}: it does something that the trainer does not know, "
                "and cannot be trained yet"
            )

    @torch.no_grad()
    def _check_sharing(self) -> None:
        """Two sequences with a common prompt, shared and not, come to the same hidden states."""
        ids = self._probe()
        pack = torch.cat([ids, ids[:4], ids[4:].flip(0)]), torch.arange(8).repeat(2), torch.tensor([0, 8, 16])
        scored = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
        plain = self.hidden(*pack, scored)
        self.shares = True
        distance = ((self.hidden(*pack, scored) - plain).norm() / plain.norm()).item()
        if not distance <= (HALF_HIDDEN_TOLERANCE if plain.dtype not in PROBE_TOLERANCE else SHARING_TOLERANCE):
            raise EngineError(
                f"{type(self.causal_lm).__name__}: a prompt computed once for two completions moves their hidden "
                f"states by {distance:.1%}: set trainer.share_prompts = false"
            )

    def _probe(self) -> Tensor:
        """A few tokens [8] from all over the vocabulary."""
        return torch.arange(1, 9, device=self.device) * 5 % 11 * (self.head.weight.shape[0] // 11)

    @contextmanager
    def _eager_attention(self) -> Iterator[None]:
        """The model's eager attention for the while."""
        if self.packs:
            self.causal_lm.set_attn_implementation("eager")
        yield
        if self.packs:
            self.causal_lm.set_attn_implementation(PACKED_ATTENTION)


def load_causal_lm(source: str | Path, config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """Load a causal LM onto ``device`` and quantize it as ``config`` says.

    Raises ``EngineError`` for what cannot be found or does not fit.
    """
    from transformers import AutoModelForCausalLM

    dtype = resolve_dtype(config.dtype, device)
    # In transformers' own device map the weights go straight to the GPU, without a copy in host memory. What is to be
    # quantized comes by way of the host, so that the GPU never holds the dense model.
    direct = device.type == "cuda" and config.quantization == "none"
    placement = {"device_map": {"": device}} if direct else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(source), dtype=dtype, revision=config.revision, trust_remote_code=config.trust_remote_code, **placement
        )
        if config.quantization != "none":
            quantize_linears(model, config.quantization, device)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot load {source} as a causal language model: {str(error).splitlines()[0]}") from error
    except torch.cuda.OutOfMemoryError as error:
        raise EngineError(
            f"{source} in {dtype} does not fit on {device}: use a smaller model or a smaller dtype"
        ) from error
    return model


def _head_settings(config: Any) -> HeadSettings:
    """Read scale and softcap under the names the architectures give them."""
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    scale = None
    if getattr(text, "logit_scale", None) is not None:  # Cohere multiplies
        scale = float(text.logit_scale)
    elif getattr(text, "logits_scaling", None) is not None:  # Granite divides
        scale = 1.0 / float(text.logits_scaling)
    elif getattr(text, "lm_head_multiplier", None) is not None:  # Falcon-H1 multiplies
        scale = float(text.lm_head_multiplier)
    return HeadSettings(None if softcap is None else float(softcap), scale)


def _rope_limit(config: Any) -> int | None:
    """Length up to which rotary frequencies do not depend on the longest sequence of a pack; ``None``: never do."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    limits = [
        int(kind.get("original_max_position_embeddings") or text.max_position_embeddings)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits) if limits else None
