"""Shared prompts through the Triton kernels, interpreted on the host, against torch alone with nothing shared."""

from __future__ import annotations

import pytest
import torch

from posttrain.rl import algorithms
from posttrain.trainer import attention
from tests.kernels.kernel_tests import INTERPRETED, run_interpreted

from .test_shared_prompts import members
from .tiny import gradients, packed, save_tiny, trainer_of, wake_adapter


def test_under_the_interpreter():
    run_interpreted(__file__, at_least=2)


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter; tests/trainer/test_gpu.py has its like for a GPU")
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_step_through_the_kernels(tmp_path, monkeypatch, family):
    folder = save_tiny(tmp_path, family)
    monkeypatch.setattr(attention, "_logged", set())
    ours = trainer_of(folder, "float32", kernels="triton")
    assert any("Triton" in line and "shared prompts" in line for line in attention._logged)
    theirs = trainer_of(folder, "float32", kernels="reference", share_prompts=False)
    batch = packed(members({"a": 2, "start of a": 1}), temperature=0.8)
    scores = []
    for trainer in (ours, theirs):
        wake_adapter(trainer)
        scores.append(trainer.score([batch])[0])
        trainer.forward_backward([batch], algorithms.parse("grpo"))
    torch.testing.assert_close(scores[0].logprobs, scores[1].logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[0].entropy, scores[1].entropy, rtol=1e-5, atol=1e-5)
    expected = gradients(theirs)
    for name, gradient in gradients(ours).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=2e-4 * scale, msg=name)
