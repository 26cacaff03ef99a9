"""The definition of rotary embedding against transformers' functions."""

from __future__ import annotations

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from posttrain.kernels.reference import norm_rope, rope

T, N, K, D = 5, 4, 2, 16


def angles(rotated, twice_in_a_row):
    turns = torch.arange(T)[:, None] * 100.0 ** (-torch.arange(0, rotated, 2) / rotated)
    table = turns.repeat_interleave(2, 1) if twice_in_a_row else torch.cat((turns, turns), 1)
    return table.cos(), table.sin()


@pytest.mark.parametrize(
    ("model", "rotated", "interleaved"),
    [
        (modeling_llama, D, False),
        (modeling_phi3, 12, False),
        (modeling_cohere, D, True),
        (modeling_glm, 8, True),
    ],
)
def test_it_is_what_models_compute(model, rotated, interleaved):
    q, k = torch.randn(T, N, D), torch.randn(T, K, D)
    tables = angles(rotated, model is modeling_cohere)
    heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
    theirs = model.apply_rotary_pos_emb(*heads, *(table.unsqueeze(0) for table in tables))
    if model is modeling_glm:  # two equal halves, although its pairs are neighbours
        tables = tuple(table[:, : rotated // 2].repeat_interleave(2, 1) for table in tables)
    for ours, right in zip(rope(q, k, *tables, interleaved=interleaved), theirs, strict=True):
        torch.testing.assert_close(ours, right[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_after_a_norm_it_is_what_qwen3_computes():
    q, k, (cos, sin) = torch.randn(T, N, D), torch.randn(T, K, D), angles(D, False)
    norms = [Qwen3RMSNorm(D), Qwen3RMSNorm(D)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    normed = (norm(x).transpose(0, 1) for norm, x in zip(norms, (q, k), strict=True))
    theirs = modeling_llama.apply_rotary_pos_emb(*normed, cos, sin, unsqueeze_dim=0)
    ours = norm_rope(q, k, norms[0].weight, norms[1].weight, 1e-6, cos, sin)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right.transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_are_those_of_differences(interleaved):
    cos, sin = (x[:2].double() for x in angles(6, interleaved))
    shapes = ((2, 2, 8), (2, 1, 8), (8,), (8,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(q, k, q_weight, k_weight):
        return norm_rope(q, k, q_weight, k_weight, 1e-3, cos, sin, offset=1.0, interleaved=interleaved)

    assert torch.autograd.gradcheck(function, inputs)
