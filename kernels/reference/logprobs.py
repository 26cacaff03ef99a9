"""Log-probabilities without logits: the definition, in torch.

Shape letters: T scored tokens, V vocabulary, H hidden, N rows of one block, C columns of one vocabulary tile.

The head turns a hidden state ``h`` into logits in this order, every step optional: ``z = W h + bias``, ``y = scale z``,
``y = softcap tanh(y / softcap)``, ``x = y / temperature``. All arithmetic is float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.kernels.reference.precision import accumulation_dtype

BLOCK_ROWS = 4096
"""Hidden states worked on at once: a tile never exceeds ``BLOCK_ROWS × chunk`` numbers."""


class Head(NamedTuple):
    """What stands between a hidden state and a log-probability besides the weight."""

    temperature: float
    softcap: float | None
    scale: float | None
    chunk: int


class Block(NamedTuple):
    """Statistics of one block of rows, all [N]; ``others`` means every symbol but the target."""

    logprobs: Tensor
    entropy: Tensor
    log_rest: Tensor
    """Log-probability of all others together."""
    lse: Tensor
    """Log-sum-exp over the whole vocabulary."""


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
    chunk: int = 4096,
) -> tuple[Tensor, Tensor]:
    """Log-probability of ``targets`` and entropy of the distribution, without ever holding a [T, V] tensor.

    ``hidden`` [T, H], ``weight`` [V, H], ``targets`` int64 [T], ``bias`` [V] → ``logprobs`` [T], ``entropy`` [T] in
    nats, float32 or float64. Gradients flow to ``hidden`` and, where they require it, to ``weight`` and ``bias``; the
    entropy has one only with ``entropy_gradient``. The values do not depend on whether gradients are wanted.

    With a frozen head ``∂logp/∂h`` comes out of the same sweep over the vocabulary (online softmax), so that the
    backward pass is a row scaling. The target is kept apart from the sum over the others:
    ``logp = −softplus(logsumexp_{j≠t} x_j − x_t)`` keeps the digits that ``x_t − logsumexp`` loses beyond 16 nats.
    """
    assert hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1], "hidden [T, H], weight [V, H]"
    assert targets.shape == hidden.shape[:1], "one target a row"
    head = Head(temperature, softcap, scale, chunk)
    wants_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    if not wants_gradient:
        blocks = [_forward_block(h, weight, t, bias, head, 0)[0] for h, t in _row_blocks(hidden, targets)]
        return concatenate(blocks, "logprobs", hidden), concatenate(blocks, "entropy", hidden)
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
        blocks, directions = [], []
        for h, t in _row_blocks(hidden, targets):
            block, direction = _forward_block(h, weight, t, bias, head, 2 if entropy_gradient else 1)
            blocks.append(block)
            directions.append(direction)
        kept = [torch.cat(parts) for parts in zip(*directions)] if directions else []
        ctx.save_for_backward(*kept)
        entropy = concatenate(blocks, "entropy", hidden)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return concatenate(blocks, "logprobs", hidden), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.saved_tensors:
            return (None,) * 6
        dtype = ctx.saved_tensors[0].dtype
        grad_hidden: Tensor | None = None
        for grad, direction in zip(grads, ctx.saved_tensors):
            term = grad.to(accumulation_dtype(dtype)).unsqueeze(1) * direction
            grad_hidden = term if grad_hidden is None else grad_hidden + term
        assert grad_hidden is not None
        return grad_hidden.to(dtype), None, None, None, None, None


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
        blocks = [_forward_block(h, weight, t, bias, head, 0)[0] for h, t in _row_blocks(hidden, targets)]
        stats = [concatenate(blocks, name, hidden) for name in ("logprobs", "entropy", "log_rest", "lse")]
        ctx.save_for_backward(hidden, weight, targets, bias, *stats)
        ctx.head = head
        # A fresh tensor: the saved one must stay an intermediate of this Function.
        logprobs, entropy = stats[0].clone(), stats[1].clone()
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        ctx.entropy_gradient = entropy_gradient
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, logprobs, entropy, log_rest, lse = ctx.saved_tensors
        head: Head = ctx.head
        dtype = accumulation_dtype(hidden.dtype)
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        for start in range(0, weight.shape[0], head.chunk):
            tile = _operand(weight[start : start + head.chunk], hidden)
            tile_weight = torch.zeros(tile.shape, dtype=dtype, device=tile.device)
            tile_bias = tile_weight.new_zeros(tile.shape[0])
            for low in range(0, hidden.shape[0], BLOCK_ROWS):
                rows = slice(low, low + BLOCK_ROWS)
                h = _operand(hidden[rows], weight)
                x, slope = _logits(h, tile, None if bias is None else bias[start : start + head.chunk], head)
                is_target = _target_mask(targets[rows], start, tile.shape[0])
                probs = torch.exp(x - lse[rows, None]).masked_fill(is_target, 0)
                grad_x = -grads[0][rows, None] * probs
                # 1 − p_t from the log-probability of the others: no digits lost when p_t is near 1
                at_target = grads[0][rows, None] * torch.exp(log_rest[rows, None])
                if ctx.entropy_gradient:
                    surprise = torch.where(is_target, logprobs[rows, None], x - lse[rows, None]) + entropy[rows, None]
                    grad_x = grad_x - grads[1][rows, None] * probs * surprise
                    own = torch.exp(logprobs[rows]) * (logprobs[rows] + entropy[rows])
                    at_target = at_target - (grads[1][rows] * own).unsqueeze(1)
                grad_z = torch.where(is_target, at_target, grad_x) * slope
                tile_weight += _product(grad_z.T, h)
                tile_bias += grad_z.sum(0)
                if grad_hidden is not None:
                    grad_hidden[rows] += _product(grad_z, tile)
            if grad_weight is not None:
                grad_weight[start : start + head.chunk] = tile_weight.to(weight.dtype)
            if grad_bias is not None:
                grad_bias[start : start + head.chunk] = tile_bias.to(grad_bias.dtype)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, grad_bias, None, None


def _forward_block(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, head: Head, directions: int
) -> tuple[Block, tuple[Tensor, ...]]:
    """One sweep over the vocabulary for one block of rows; ``directions`` 0, 1 (logp) or 2 (and entropy) of [N, H].

    Running over the others: their maximum ``m``, ``S = Σ e``, ``E = Σ e·(x − m)`` and, for the directions,
    ``A = Σ e·w`` and ``B = Σ e·(x − m)·w`` with ``e = exp(x − m)`` and ``w`` the weight row times the slope dx/dz.
    """
    dtype = accumulation_dtype(hidden.dtype)
    h = _operand(hidden, weight)
    count = h.new_zeros(h.shape[0], dtype=dtype)
    m, total, energy, x_target = torch.full_like(count, -math.inf), count, count, torch.full_like(count, -math.inf)
    slope_target = torch.zeros_like(count)
    sums = [torch.zeros(h.shape, dtype=dtype, device=h.device) for _ in range(directions)]
    for start in range(0, weight.shape[0], head.chunk):
        tile = _operand(weight[start : start + head.chunk], hidden)
        x, slope = _logits(h, tile, None if bias is None else bias[start : start + head.chunk], head)
        is_target = _target_mask(targets, start, tile.shape[0])
        found = is_target.any(1)
        x_target = torch.where(found, x.masked_fill(~is_target, 0).sum(1), x_target)
        slope_target = torch.where(found, (slope * is_target).sum(1), slope_target)
        x = x.masked_fill(is_target, -math.inf)
        new_m = torch.maximum(m, x.amax(1))
        # A row whose only symbol so far is its target has no maximum yet: measure from 0 there.
        safe_m = torch.where(new_m == -math.inf, torch.zeros_like(new_m), new_m)
        shift = torch.where(m == -math.inf, torch.zeros_like(m), m - safe_m)
        decay = torch.where(m == -math.inf, torch.zeros_like(m), torch.exp(shift))
        x = x - safe_m.unsqueeze(1)
        e = torch.exp(x)
        weighted = e * x.masked_fill(is_target, 0)
        energy = decay * (energy + shift * total) + weighted.sum(1)
        total = decay * total + e.sum(1)
        if directions > 1:
            sums[1] = decay.unsqueeze(1) * (sums[1] + shift.unsqueeze(1) * sums[0]) + _product(weighted * slope, tile)
        if directions:
            sums[0] = decay.unsqueeze(1) * sums[0] + _product(e * slope, tile)
        m = new_m
    block, log_total = finish(m, total, energy, x_target)
    if not directions:
        return block, ()
    target_rows = weight[targets].to(dtype) * slope_target.unsqueeze(1)
    alone = (total == 0).unsqueeze(1)  # a vocabulary of one
    mean_rows = torch.where(alone, torch.zeros_like(sums[0]), sums[0] / total.unsqueeze(1))
    rest = torch.exp(block.log_rest).unsqueeze(1)
    kept = [rest * (target_rows - mean_rows)]
    if directions > 1:
        mean_log = torch.where(
            alone, torch.zeros_like(mean_rows), sums[1] / total.unsqueeze(1) - log_total[:, None] * mean_rows
        )
        log_rest = torch.where(alone, torch.zeros_like(rest), block.log_rest.unsqueeze(1))
        entropy, logprobs = block.entropy.unsqueeze(1), block.logprobs.unsqueeze(1)
        kept.append(
            -rest * ((log_rest + entropy) * mean_rows + mean_log)
            - torch.exp(logprobs) * (logprobs + entropy) * target_rows
        )
    return block, tuple(direction.to(hidden.dtype) for direction in kept)


def finish(m: Tensor, total: Tensor, energy: Tensor, x_target: Tensor) -> tuple[Block, Tensor]:
    """Log-probability and entropy from the running sums: the two-symbol case (target, rest), then the rest inside."""
    log_total = torch.log(total)
    gap = m + log_total - x_target
    logprobs = -torch.logaddexp(gap, torch.zeros_like(gap))
    log_rest = -torch.logaddexp(-gap, torch.zeros_like(gap))
    rest = torch.exp(log_rest)
    inside = torch.where(total == 0, torch.zeros_like(total), log_total - energy / total)
    between = -torch.exp(logprobs) * logprobs - torch.where(rest == 0, torch.zeros_like(rest), rest * log_rest)
    return Block(logprobs, between + rest * inside, log_rest, x_target - logprobs), log_total


def _logits(h: Tensor, tile: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor]:
    """Logits [N, C] of one tile and their slope dx/dz, a scalar tensor where it is the same everywhere."""
    # products of two bfloat16 numbers are exact in float32, so nothing is lost by leaving the operands as they are
    y = torch.mm(h, tile.T, out_dtype=torch.float32) if _half_operands(h) else h @ tile.T
    if bias is not None:
        y = y + bias.to(y.dtype)
    scale = 1.0 if head.scale is None else head.scale
    if scale != 1.0:
        y = y * scale
    slope = y.new_tensor(scale / head.temperature)
    if head.softcap is not None:
        capped = torch.tanh(y / head.softcap)
        slope = slope * (1 - capped * capped)
        y = head.softcap * capped
    return (y / head.temperature if head.temperature != 1.0 else y), slope


def _half_operands(operand: Tensor) -> bool:
    """Whether matrix products take bfloat16 operands: a GPU has no other fast way to a float32 result."""
    return operand.is_cuda and operand.dtype == torch.bfloat16


def _operand(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` as matrix products take it when it meets ``other``."""
    if _half_operands(tensor) and _half_operands(other):
        return tensor
    return tensor.to(accumulation_dtype(torch.promote_types(tensor.dtype, other.dtype)))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with ``a`` in float32 or float64. Before a bfloat16 ``b``, ``a`` goes in as a sum of two bfloat16."""
    if not _half_operands(b):
        return a @ b
    high = a.to(b.dtype)
    low = (a - high).to(b.dtype)
    return torch.mm(high, b, out_dtype=torch.float32) + torch.mm(low, b, out_dtype=torch.float32)


def _target_mask(targets: Tensor, start: int, width: int) -> Tensor:
    """bool [N, C], true at each row's target where it lies in the tile."""
    return targets.unsqueeze(1) - start == torch.arange(width, device=targets.device)


def _row_blocks(hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [
        (hidden[low : low + BLOCK_ROWS], targets[low : low + BLOCK_ROWS])
        for low in range(0, hidden.shape[0], BLOCK_ROWS)
    ]


def concatenate(blocks: list[Block], name: str, hidden: Tensor) -> Tensor:
    """One of the blocks' tensors, for all rows."""
    if not blocks:
        return hidden.new_zeros(0, dtype=accumulation_dtype(hidden.dtype))
    return torch.cat([getattr(block, name) for block in blocks])
