"""The definition of RMS norm against transformers' modules."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from posttrain.kernels.reference import add_rms_norm, rms_norm


@pytest.mark.parametrize(("norm", "offset"), [(Qwen3RMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
def test_it_is_what_models_compute(norm, offset):
    theirs = norm(41, eps=1e-5)
    x = torch.randn(2, 3, 41)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(41))
    torch.testing.assert_close(rms_norm(x, theirs.weight, 1e-5, offset=offset), theirs(x), rtol=1e-6, atol=1e-6)


def test_by_hand():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float16)  # mean square 12.5
    weight = torch.tensor([1.0, -2.0])
    normed, total = add_rms_norm(x - 1, torch.ones_like(x), weight, 12.5, offset=1.0)
    assert torch.equal(total, x)
    assert torch.equal(normed, torch.tensor([[3 / 5 * 2, 4 / 5 * -1]], dtype=torch.float16))


def test_gradients_are_those_of_differences():
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 7), (3, 7), (7,))]
    assert torch.autograd.gradcheck(lambda x, residual, w: add_rms_norm(x, residual, w, 1e-3, offset=1.0), inputs)
