"""The byte model of activations: what the backward pass of the largest micro-batch keeps, and what it takes beside.

Sizes in bytes; T packed tokens, H hidden, I the MLP's inner width, V vocabulary, N heads, K key heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.rl.architecture import linear_layers

if TYPE_CHECKING:
    from posttrain.rl.config import Config, TrainerConfig

ON_KERNELS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
"""Architectures whose whole decoder layer is made of our kernels (``trainer.families``), by transformers' name."""
SANDWICH = ("gemma3_text",)
"""Of these, those that norm what attention and MLP return."""
TILE_ROWS = 4096
"""Rows of the logits worked on at once, in float32: ``ROWS`` of ``kernels.token_logprobs``, the reference's too."""
KERNEL_COLUMNS = 8192
"""Columns of a tile, ``CHUNK`` of ``kernels.token_logprobs``."""
REFERENCE_COLUMNS = 4096
"""The default of ``kernels.reference.token_logprobs``, which makes three of a tile."""


@dataclass(slots=True, frozen=True)
class Activations:
    """Of the largest micro-batch."""

    device: int
    """In the memory the trainer works in."""
    host: int
    """In pinned memory of the host, beside a GPU."""


@dataclass(slots=True, frozen=True)
class _Token:
    """Bytes of one token."""

    layer: int
    """That a decoder layer keeps for its backward pass."""
    working: int
    """Beside them while a layer's backward pass runs."""
    head: int
    """Behind the last layer, before the backward pass begins."""


def count_activations(config: Config, model: Any, size: int, length: int, on_gpu: bool) -> Activations:
    """``size``: bytes of a number in the model's type; ``length``: of the longest sequence.

    Without checkpointing every layer keeps what it needs; with it, its input, and one layer at a time is whole.
    Offloaded inputs are on the GPU while they come and go: two of them. ``auto`` counts as without
    (``rl.memory.settled`` decides).
    """
    trainer, text = config.trainer, model.config.get_text_config()
    kernels = trainer.kernels == "triton" or (trainer.kernels == "auto" and on_gpu and size < 8)
    fused = kernels and trainer.method == "lora" and text.model_type in ON_KERNELS
    token = _fused(trainer, model, size) if fused else _plain(model, size, length, kernels)
    tokens_T, layers, an_input = _tokens(config, length), text.num_hidden_layers, text.hidden_size * size
    recomputed = trainer.activation_checkpointing is True
    offloaded = layers - 1 if recomputed and trainer.offload_activations and on_gpu else 0
    if recomputed:
        inputs = min(layers, 2) if offloaded else layers
        peak = inputs * an_input + max(token.layer + token.working, token.head)
    else:
        peak = layers * token.layer + max(token.working, token.head)
    tile = _tile(min(tokens_T, TILE_ROWS), text.vocab_size, text.hidden_size, kernels)
    return Activations(tokens_T * peak + tile, tokens_T * offloaded * an_input)


def _tokens(config: Config, length: int) -> int:
    """Of the largest micro-batch: at its limit, or a whole update, or one sequence."""
    rollout, trainer = config.rollout, config.trainer
    everything = rollout.prompts_per_step * rollout.group_size * length // trainer.updates_per_batch
    return min(everything, max(trainer.micro_batch_tokens, length))


def _fused(trainer: TrainerConfig, model: Any, size: int) -> _Token:
    """A layer on our kernels: the sum of what its nodes save, each tensor once.

    Working: the gradients of the layer's output, of the MLP's inner product and of two tensors as wide as the layer.
    Head: the last norm's input and output, the rows to score and ``∂logp/∂h`` [T, H].
    """
    text = model.config.get_text_config()
    hidden, inner = text.hidden_size, text.intermediate_size
    width = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    queries, keys = text.num_attention_heads * width, text.num_key_value_heads * width
    rotated = queries + 2 * keys + queries  # with the values, and what attention returns
    # q and k are kept before their norm, too; Phi-3's are one tensor with v, which is kept as it is
    before = queries + keys if text.model_type in ("qwen3", "gemma3_text", "phi3") else 0
    norms = (2 if text.model_type in SANDWICH else 0) * hidden
    ranks = trainer.lora.rank * len(linear_layers(model)) // text.num_hidden_layers
    stream = 4 * hidden  # the input, the sum after attention, and the norm of either
    kept = (stream + before + rotated + norms + 2 * inner + ranks) * size
    log_sums = text.num_attention_heads * 4
    return _Token(kept + log_sums, (inner + 3 * hidden) * size, 4 * hidden * size)


def _plain(model: Any, size: int, length: int, kernels: bool) -> _Token:
    """A layer of transformers' and peft's: about what goes into and comes out of each of its matrix products, and its
    norms' inputs in float32.
    """
    text = model.config.get_text_config()
    hidden = text.hidden_size
    widths = sum(sum(layer.weight.shape) for layer in linear_layers(model).values())
    products = widths * size // text.num_hidden_layers
    active = getattr(text, "num_experts_per_tok", None) or 0
    if active:  # experts are stacked in one parameter: gate, up and down of those that a token visits
        inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        products += active * (2 * hidden + 4 * inner) * size
    kept = products + 4 * hidden * 4 + _scores(model, size, length, kernels)
    return _Token(kept, 3 * hidden * 4, 3 * hidden * 4)


def _scores(model: Any, size: int, length: int, kernels: bool) -> int:
    """A token's attention scores in one layer, where the trainer writes them out (sinks, and a softcap without our
    kernels): the bent scores and their softmax in float32, and the weights in the model's type.
    """
    text = model.config.get_text_config()
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    softcap = getattr(text, "attn_logit_softcapping", None) is not None
    if not sinks and (kernels or not softcap):
        return 0
    return text.num_attention_heads * length * (4 + 4 + (size if size < 4 else 0))


def _tile(rows: int, vocabulary: int, hidden: int, kernels: bool) -> int:
    """Logits in float32 of the rows worked on at once, with our kernels their sums ``Σ e·w`` beside them."""
    if kernels:
        return rows * (min(vocabulary, KERNEL_COLUMNS) + hidden) * 4
    return 3 * rows * min(vocabulary, REFERENCE_COLUMNS) * 4
