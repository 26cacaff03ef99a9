"""Log-probabilities without logits: cuBLAS makes the logits of a tile, one Triton kernel turns them into the factors of
the next product.

Shape letters: T scored tokens, V vocabulary, H hidden, N rows of one block, C columns of one vocabulary tile.

The sweep holds ``ROWS × CHUNK`` logits in float32, the running statistics of a block and, where a gradient is wanted,
``A = Σ e·w`` [N, H] in float32. Factors ``e`` take the logits' memory in the type of the hidden states: one rounding of
each term, as the softmax of a plain bfloat16 implementation has. Definition: ``kernels/reference/logprobs.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.kernels import reference
from posttrain.kernels.reference.logprobs import Block, Head, concatenate, finish
from posttrain.kernels.vocabulary_tiles import (
    MOST_COLUMNS,
    STATISTICS,
    product,
    slope,
    tile_views,
    update_statistics,
    write_directions,
    write_logit_gradients,
)

ROWS = 4096
"""Hidden states worked on at once. With H = 4096 and ``CHUNK`` columns: 134 MB of logits and 67 MB of sums."""
CHUNK = 8192
"""Columns of a tile. Each tile reads and writes the sums once, in the product: fewer columns do so more often."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    entropy_gradient: bool = False,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Log-probability of ``targets`` and entropy of the distribution, without ever holding a [T, V] tensor.

    ``hidden`` [T, H], ``weight`` [V, H], ``targets`` int64 [T], ``bias`` [V] → ``logprobs`` [T], ``entropy`` [T] in
    nats, float32. Gradients flow to ``hidden`` and, where they require it, to ``weight`` and ``bias``; the entropy has
    one only with ``entropy_gradient``. The values are the same bits whether or not gradients are wanted. The weight is
    a dense one, tied or not: heads are never quantized, by this package or by vLLM. float64 goes through the reference.

    With a frozen head the backward pass can run once: it scales ``∂logp/∂h`` in place.
    """
    assert hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1], "hidden [T, H], weight [V, H]"
    assert targets.shape == hidden.shape[:1], "one target a row"
    assert 0 < chunk <= MOST_COLUMNS, f"a tile has at most {MOST_COLUMNS} columns"
    if torch.promote_types(hidden.dtype, weight.dtype) == torch.float64:
        return reference.token_logprobs(
            hidden,
            weight,
            targets,
            temperature=temperature,
            bias=bias,
            softcap=softcap,
            scale=scale,
            entropy_gradient=entropy_gradient,
        )
    head = Head(temperature, softcap, scale, min(chunk, weight.shape[0]))
    targets, bias = targets.contiguous(), None if bias is None else bias.contiguous()
    wants_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    if not wants_gradient:
        found, _ = _sweep(hidden, weight, targets, bias, head, 0)
        return found.logprobs, found.entropy
    trainable = weight.requires_grad or (bias is not None and bias.requires_grad)
    function = _TrainableHead if trainable else _FrozenHead
    logprobs, entropy = function.apply(hidden, weight, targets, bias, head, entropy_gradient)
    return logprobs, entropy


class _FrozenHead(torch.autograd.Function):
    """Only ``hidden`` has a gradient: keep ``∂logp/∂h`` [T, H] (and ``∂entropy/∂h`` if asked), nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        head: Head,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        found, directions = _sweep(hidden, weight, targets, bias, head, 2 if entropy_gradient else 1)
        ctx.save_for_backward(*directions)
        if not entropy_gradient:
            ctx.mark_non_differentiable(found.entropy)
        return found.logprobs, found.entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: at T = 163,840 a second [T, H] is 1.3 GB. Autograd refuses a second pass over a changed tensor.
        direction, *other = ctx.saved_tensors
        if not other:
            direction.mul_(grads[0].unsqueeze(1))
        for low in range(0, direction.shape[0] if other else 0, ROWS):
            rows = slice(low, low + ROWS)
            term = grads[0][rows, None] * direction[rows]
            direction[rows] = term.add_(grads[1][rows, None] * other[0][rows])
        return direction, None, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """``weight`` or ``bias`` has a gradient: keep [T] statistics and sweep the vocabulary again in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        head: Head,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        found, _ = _sweep(hidden, weight, targets, bias, head, 0)
        ctx.save_for_backward(hidden, weight, targets, bias, torch.stack(found))
        ctx.head, ctx.entropy_gradient = head, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(found.entropy)
        return found.logprobs, found.entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, found = ctx.saved_tensors
        head: Head = ctx.head
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        statistics = torch.cat([found, grads[0][None], grads[1][None] * float(ctx.entropy_gradient)])
        dtype = _operand_dtype(hidden, weight)
        if dtype == torch.float16:
            dtype = torch.float32  # probabilities of rare tokens are below what float16 holds
        count, vocabulary = hidden.shape[0], weight.shape[0]
        memory = torch.empty(min(ROWS, count) * head.chunk, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        for start in range(0, vocabulary, head.chunk):
            columns = slice(start, min(start + head.chunk, vocabulary))
            tile_weight = weight[columns].to(dtype)
            sums = torch.zeros(tile_weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
            bias_sums = torch.zeros(len(tile_weight), dtype=torch.float32, device=weight.device)
            for low in range(0, count, ROWS):
                rows = slice(low, low + ROWS)
                h = hidden[rows].to(dtype)
                tile = tile_views(memory, memory, len(h), len(tile_weight), dtype)
                product(h, tile_weight.T, tile.logits)
                write_logit_gradients(tile, start, targets[rows], bias, head, statistics[:, rows])
                if sums is not None:
                    product(tile.factors.T, h, sums, add=True)
                if grad_bias is not None:
                    bias_sums += tile.factors.sum(0, dtype=torch.float32)
                if grad_hidden is not None:
                    product(tile.factors, tile_weight, grad_hidden[rows], add=True)
            if grad_weight is not None and sums is not None:
                grad_weight[columns] = sums
            if grad_bias is not None:
                grad_bias[columns] = bias_sums
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, grad_bias, None, None


def _sweep(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head: Head, directions: int
) -> tuple[Block, list[Tensor]]:
    """Once over the vocabulary for each block of rows; ``directions`` 0, 1 (logp) or 2 (and entropy) of [T, H].

    Logits come from the same product at the same shape whatever is wanted of them: the values are the same bits.
    """
    (count, width), vocabulary = hidden.shape, weight.shape[0]
    dtype = _operand_dtype(hidden, weight)
    most = min(ROWS, count)
    memory = torch.empty(most * head.chunk, dtype=torch.float32, device=hidden.device)
    beside = torch.empty_like(memory) if directions > 1 and dtype == torch.float32 else memory
    sums = [torch.empty(most, width, dtype=torch.float32, device=hidden.device) for _ in range(directions)]
    kept = [torch.empty_like(hidden, memory_format=torch.contiguous_format) for _ in range(directions)]
    blocks = []
    for low in range(0, count, ROWS):
        h, t = hidden[low : low + ROWS].to(dtype), targets[low : low + ROWS]
        block_sums = [each[: len(h)] for each in sums]
        statistics = torch.empty(STATISTICS, len(h), dtype=torch.float32, device=h.device)
        for start in range(0, vocabulary, head.chunk):
            tile_weight = weight[start : start + head.chunk].to(dtype)
            tile = tile_views(memory, beside, len(h), len(tile_weight), dtype)
            product(h, tile_weight.T, tile.logits)
            update_statistics(tile, start, t, bias, head, statistics, block_sums)
            for factors, total in zip((tile.factors, tile.weighted), block_sums):
                product(factors, tile_weight, total, add=start > 0)
        origin, total, energy, x_target, slope_target, anchor = statistics
        block, log_total = finish(origin, total, energy, x_target)
        blocks.append(block)
        if directions:
            coefficients = _coefficients(block, total, log_total + (origin - anchor), slope_target, slope(head))
            write_directions(weight, t, coefficients, block_sums, [each[low : low + ROWS] for each in kept])
    return Block(*(concatenate(blocks, name, hidden) for name in Block._fields)), kept


def _coefficients(block: Block, total: Tensor, lse_of_others: Tensor, slope_target: Tensor, scale: float) -> Tensor:
    """[5, N]: of the target's weight row and of A in ``∂logp/∂h``; of the row, A and B in ``∂entropy/∂h``.

    ``lse_of_others`` is measured from the anchor, as the factors in B are.
    """
    alone = total == 0  # a vocabulary of one
    rest, p = torch.exp(block.log_rest), torch.exp(block.logprobs)
    mean = torch.where(alone, 0.0, rest * scale / total)
    log_p = torch.where(alone, 0.0, block.log_rest + block.entropy - lse_of_others)
    own = slope_target * scale
    return torch.stack([rest * own, -mean, -p * (block.logprobs + block.entropy) * own, -mean * log_p, -mean])


def _operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Type of the products' operands. A GPU multiplies 16 bits with a float32 result; elsewhere all is float32."""
    return hidden.dtype if hidden.is_cuda and hidden.dtype == weight.dtype else torch.float32
