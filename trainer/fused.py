"""The model's parts on our kernels: modules are replaced by class, after the adapter is attached.

A replaced module keeps its parameters, its name and its base class, so that nothing but ``forward`` changes: the state
dictionary, the adapter's names and files stay peft's. What a family of classes does differently is one row of the table
in ``families``.

Shape letters: T packed tokens, H hidden, N query heads, K key heads, D head dim, R rotated dims.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from posttrain.kernels.glu import glu
from posttrain.kernels.lora_linear import lora_linear, lora_mlp, lora_qkv
from posttrain.kernels.reference.glu import Activation
from posttrain.kernels.reference.lora import Adapted, Dense, Frozen
from posttrain.kernels.rms_norm import add_rms_norm, rms_norm
from posttrain.kernels.rope import norm_rope, rope
from posttrain.rl.errors import EngineError
from posttrain.trainer.families import FAMILIES, Family
from posttrain.trainer.lora import ADAPTER
from posttrain.trainer.model import HALF_HIDDEN_TOLERANCE, PackedModel
from posttrain.trainer.offload import OUTPUT_USED
from posttrain.trainer.quantized import QuantizedLinear, use_kernels

log = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-3
"""Relative distance allowed between hidden states before and after, in float32."""
PROBE_TOKENS = 16

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Report:
    """What runs on kernels, and what does not: class names and how many."""

    fused: Counter[str]
    left: Counter[str]

    def __str__(self) -> str:
        def told(counts: Counter[str]) -> str:
            return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"

        return f"on kernels: {told(self.fused)}; left to transformers: {told(self.left)}"


def fuse(model: PackedModel) -> Report:
    """Put what the model consists of on kernels, wherever it is known to compute the same.

    Matrix products whose weights are trained stay autograd's: full fine-tuning gets norms, rotary positions and gated
    units. Raises ``EngineError`` where the model then computes something else.
    """
    name, dtype = type(model.causal_lm).__name__, model.causal_lm.dtype
    if dtype == torch.float64:
        raise EngineError('trainer.kernels = triton computes in float32 at most: set trainer.kernels = "reference"')
    with _adapter_at_work(model.causal_lm):
        before = _probe(model)
        report = _replace(model.backbone)
        use_kernels(model.causal_lm, "triton")
        after = _probe(model)
    distance = ((after - before).norm() / before.norm()).item()
    if not distance <= (FLOAT32_TOLERANCE if dtype == torch.float32 else HALF_HIDDEN_TOLERANCE):
        raise EngineError(
            f"{name}: on kernels its hidden states differ by {distance:.1%} from what transformers computes: it does "
            'something that the kernels do not know; set trainer.kernels = "reference"'
        )
    log.log(logging.WARNING if report.left else logging.INFO, "%s %s", name, report)
    return report


def _replace(backbone: nn.Module) -> Report:
    fused: Counter[str] = Counter()
    left: Counter[str] = Counter()
    classes: dict[type, type] = {}
    for module in backbone.modules():
        original = type(module)
        if original is LoraLinear:
            if _is_plain(module):
                module.__class__ = _Linear
                fused["LoRA layers"] += 1
            else:
                left["LoRA layers"] += 1
            continue
        found = _known(original)
        if found is not None and found[0].prepare(module, found[1]):
            if original not in classes:
                classes[original] = _class_of(original, *found)
            module.__class__ = classes[original]
            fused[original.__name__] += 1
        elif _is_block(module):
            left[original.__name__] += 1
    return Report(fused, left)


def _known(original: type) -> tuple[type[_Part], Family] | None:
    """The replacement of one of transformers' own classes; remote code may call itself what it likes."""
    for folder, family in FAMILIES.items():
        if original.__module__ == f"transformers.models.{folder}.modeling_{folder}":
            for part in family.parts:
                if original.__name__ == family.prefix + part:
                    return _PARTS[part], family
    return None


def _is_block(module: nn.Module) -> bool:
    """Whether it is of the kind that a row more of the table could replace."""
    kind = type(module)
    return kind.__name__.endswith((*_PARTS, "LayerNorm")) and not isinstance(module, _Part | nn.LayerNorm)


def _class_of(original: type, part: type[_Part], family: Family) -> type:
    members = {"family": family, "__module__": original.__module__}
    return type(f"Fused{original.__name__}", (part, original), members)


class _Part(nn.Module):
    """Stands before the original class in the order of bases."""

    family: Family

    @classmethod
    def prepare(cls, module: Any, family: Family) -> bool:
        """Note on the module what its forward needs; False where it cannot be replaced."""
        return True


class _Linear(LoraLinear):
    """peft's layer, in one node and without its float32 copy of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, *_adapted(self))


class _Norm(_Part):
    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, _eps(self, self.family), offset=self.family.norm_offset)


class _Mlp(_Part):
    down_proj: Any
    activation: Activation
    one_node: bool

    @classmethod
    def prepare(cls, module: Any, family: Family) -> bool:
        activation = _ACTIVATIONS.get(getattr(module.config, family.activation))
        if activation is None:
            return False
        module.activation = activation
        module.one_node = all(map(_is_plain, (*_children(module, family.inner), module.down_proj)))
        return True

    def forward(self, x: Tensor, output_used: bool = True) -> Tensor:
        inner = _children(self, self.family.inner)
        if self.one_node:
            layers = [_adapted(layer) for layer in inner]
            return lora_mlp(x, layers, _adapted(self.down_proj), self.activation, output_used=output_used)
        outputs = [layer(x) for layer in inner]
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        return self.down_proj(glu(gate, up, self.activation))


class _Attention(_Part):
    config: Any
    q_norm: Any
    k_norm: Any
    o_proj: nn.Module
    attention_dropout: float
    head_dim: int
    scaling: float
    one_node: bool

    @classmethod
    def prepare(cls, module: Any, family: Family) -> bool:
        module.one_node = all(map(_is_plain, _children(module, family.qkv)))
        return True

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert past_key_values is None and hidden_states.shape[0] == 1, "packed sequences, and no cache"
        q, k, v = self._heads(hidden_states[0])
        cos, sin = (angles[0] for angles in position_embeddings)
        if self.family.head_norms:
            weights, eps = (self.q_norm.weight, self.k_norm.weight), _eps(self.q_norm, self.family)
            q, k = norm_rope(q, k, *weights, eps, cos, sin, offset=self.family.norm_offset)
        else:
            q, k = rope(q, k, cos, sin)
        if self.family.window:
            holder = self if self.family.window == "self" else self.config
            kwargs["sliding_window"] = getattr(holder, "sliding_window", None)
        eager = sys.modules[type(self).__module__].eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, T, D]
        dropout = self.attention_dropout if self.training else 0.0
        attended, scores = attend(self, *heads, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(attended.reshape(*hidden_states.shape[:2], -1)), scores

    def _heads(self, hidden: Tensor) -> list[Tensor]:
        """q [T, N, D], k and v [T, K, D]."""
        layers = _children(self, self.family.qkv)
        if self.one_node:
            outputs = lora_qkv(hidden, [_adapted(layer) for layer in layers])
        else:
            outputs = tuple(layer(hidden) for layer in layers)
        if len(outputs) == 1:
            keys = self.config.num_key_value_heads * self.head_dim
            outputs = outputs[0].split([outputs[0].shape[1] - 2 * keys, keys, keys], dim=1)
        return [output.view(len(hidden), -1, self.head_dim) for output in outputs]


class _Layer(_Part):
    """The sum with the residual stream and the norm after it are one kernel."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: Any
    pre_feedforward_layernorm: Any
    post_feedforward_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        sandwich = self.family.sandwich
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if sandwich:
            attended = self.post_attention_layernorm(attended)
        norm = self.pre_feedforward_layernorm if sandwich else self.post_attention_layernorm
        eps, offset = _eps(norm, self.family), self.family.norm_offset
        normed, total = add_rms_norm(attended, hidden_states, norm.weight, eps, offset=offset)
        if sandwich:
            return total + self.post_feedforward_layernorm(self.mlp(normed))
        if not OUTPUT_USED.get() and isinstance(self.mlp, _Mlp):
            return total + self.mlp(normed, output_used=False)
        return total + self.mlp(normed)


_PARTS: dict[str, type[_Part]] = {"RMSNorm": _Norm, "MLP": _Mlp, "Attention": _Attention, "DecoderLayer": _Layer}


def _children(module: nn.Module, names: Sequence[str]) -> list[Any]:
    return [getattr(module, name) for name in names]


def _eps(norm: Any, family: Family) -> float:
    return getattr(norm, family.eps)


def _is_plain(layer: Any) -> bool:
    """Whether a layer is ``x Wᵀ + bias`` with a frozen W, and perhaps an adapter that is LoRA and nothing else."""
    if isinstance(layer, LoraLinear):
        plain = (
            list(layer.lora_A) == [ADAPTER]
            and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
            and not layer.lora_variant
            and not layer.lora_bias[ADAPTER]
            and not layer.fan_in_fan_out
            and not layer.merged
        )
        return plain and _is_plain(layer.base_layer)
    return (type(layer) is nn.Linear or isinstance(layer, QuantizedLinear)) and not layer.weight.requires_grad


def _adapted(layer: Any) -> Adapted:
    """The layer as the kernels take it; without its adapter where peft has switched that off."""
    if not isinstance(layer, LoraLinear):
        return Adapted(_frozen(layer))
    if layer.disable_adapters:
        return Adapted(_frozen(layer.base_layer))
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return Adapted(_frozen(layer.base_layer), a, b, layer.scaling[ADAPTER])


def _frozen(layer: Any) -> Frozen:
    return layer if isinstance(layer, QuantizedLinear) else Dense(layer.weight, layer.bias)


@contextmanager
@torch.no_grad()
def _adapter_at_work(causal_lm: PreTrainedModel) -> Iterator[None]:
    """A fresh adapter changes nothing (B = 0): another B for the while, so that leaving the adapter out would show."""
    generator = torch.Generator().manual_seed(0)
    outputs = [weight for name, weight in causal_lm.named_parameters() if ".lora_B." in name]
    kept = [weight.clone() for weight in outputs]
    for weight in outputs:
        weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    yield
    for weight, value in zip(outputs, kept):
        weight.copy_(value)


@torch.no_grad()
def _probe(model: PackedModel) -> Tensor:
    """Hidden states [S, H] of a few tokens, in float32."""
    vocabulary = model.head.weight.shape[0]
    ids = torch.arange(1, PROBE_TOKENS + 1) * 5 % 11 * (vocabulary // 11)
    positions = torch.arange(PROBE_TOKENS)
    return model.hidden(ids, positions, torch.tensor([0, PROBE_TOKENS]), positions[1:]).float()
