"""What only a GPU can show: flash attention over packs, half precision, 8-bit AdamW, peak memory."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch

from posttrain.kernels.reference import token_logprobs
from posttrain.kernels.reference.attention import Segments
from posttrain.rl import algorithms, metrics
from posttrain.rl.config import ModelConfig, TrainerConfig
from posttrain.trainer import attention
from posttrain.trainer.attention import Packing, packed_attention
from posttrain.trainer.trainer import Trainer

from .test_attention import dense
from .tiny import VOCABULARY, gradients, packed, save_tiny, sequences, step_params, wake_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LENGTHS = [70, 3, 129, 64, 1, 33]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def trainer_on_gpu(folder, dtype="bfloat16", **settings):
    config = TrainerConfig(device="cuda", **settings)
    return Trainer(folder, ModelConfig(name=str(folder), dtype=dtype), config, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("qwen3"), initializer_range=0.1, **SIZES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["mha", "gqa"])
def test_flash_attention_over_a_pack_equals_a_dense_softmax(dtype, window, heads):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs Ampere")
    bounds = [0, 1, 40, 105, 192]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads[0], 192, 64), (1, heads[1], 192, 64), (1, heads[1], 192, 64)]
    inputs = [torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
    assert attention._varlen_fits(inputs[0].squeeze(0), inputs[2].squeeze(0))
    packing = Packing(Segments.of([1, 39, 65, 87], device="cuda"))
    ours, _ = packed_attention(
        torch.nn.Module(), *inputs, None, scaling=0.125, sliding_window=window, packing=packing, dropout=0.0
    )
    theirs = dense(*exact, bounds, 0.125, window)
    torch.testing.assert_close(ours.double().cpu(), theirs, rtol=0, atol=2e-2)
    weights = torch.randn(theirs.shape, generator=generator)
    one = torch.autograd.grad((ours * weights.to(ours)).sum(), inputs)
    two = torch.autograd.grad((theirs * weights.double()).sum(), exact)
    for ours_grad, theirs_grad in zip(one, two):
        # A window of 1 has no gradient at all for queries and keys.
        assert (ours_grad.double().cpu() - theirs_grad).norm() < 1e-2 * theirs_grad.norm() + 1e-3


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gemma3_text", "gemma2"])
def test_packed_equals_one_by_one_in_bfloat16(tmp_path, caplog, family):
    extra = {"sliding_window": 20} if family in ("mistral", "gemma3_text", "gemma2") else {}
    with caplog.at_level(logging.INFO, logger="posttrain"):
        attention._logged.clear()
        trainer = trainer_on_gpu(save_tiny(tmp_path, family, initializer_range=0.1, **SIZES, **extra))
        wake_adapter(trainer)
        made = sequences(LENGTHS)
        whole = trainer.score([packed(made)])[0]
    expected = "varlen_attn" if family != "gemma2" and attention._varlen_groups_heads() else "Triton"
    assert f"packed attention: {expected}" in caplog.text.replace("torch varlen", "varlen")
    assert "one segment at a time" not in caplog.text
    parts = trainer.score([packed([member]) for member in made])
    logprobs = torch.cat([part.logprobs for part in parts])
    assert (whole.logprobs - logprobs).abs().max() < 0.1
    assert (whole.logprobs - logprobs).abs().mean() < 1e-2
    exact = trainer_of_cpu(tmp_path)
    wake_adapter(exact)
    assert (whole.logprobs - exact.score([packed(made)])[0].logprobs).abs().mean() < 5e-2


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("way", ["Triton", "varlen_attn", "float16", "float32"])
def test_shared_prompts_on_the_gpu(tmp_path, caplog, monkeypatch, family, way):
    """Three groups of four through our kernel, and through flash attention with copied keys, against float32 on the
    CPU where nothing is shared.
    """
    softcapped = family == "gemma2"
    monkeypatch.setattr(attention, "TRITON_FOR_SHARED_PROMPTS", way != "varlen_attn")
    monkeypatch.setattr(attention, "TRITON_FOR_REPEATED_HEADS", False)
    dtype = way if way in ("float16", "float32") else "bfloat16"
    folder = save_tiny(tmp_path, family, initializer_range=0.1, **SIZES, sliding_window=20)
    made = []
    for group, length in enumerate((70, 3, 33)):
        prompt = (torch.arange(length) * 7 + group) % VOCABULARY
        for ids, _, advantage in sequences([60, 9, 64, 25], seed=group):
            mask = torch.arange(length + len(ids)) >= length
            made.append((torch.cat([prompt, ids]), mask, advantage))
    with caplog.at_level(logging.INFO, logger="posttrain"):
        attention._logged.clear()
        trainer = trainer_on_gpu(folder, dtype)
    exact = Trainer(
        folder, ModelConfig(name=str(folder), dtype="float32"), TrainerConfig(device="cpu", share_prompts=False)
    )
    taken = "varlen_attn" if way == "varlen_attn" and not softcapped else "Triton"
    assert any(taken in record.message and "shared prompts" in record.message for record in caplog.records)
    found = []
    for one in (trainer, exact):
        wake_adapter(one)
        logprobs = one.score([packed(made)])[0].logprobs
        one.forward_backward([packed(made)], algorithms.parse("grpo"))
        found.append((logprobs, torch.cat([g.double().cpu().flatten() for g in gradients(one).values()])))
    (ours, gradient), (theirs, expected) = found
    mask = packed(made).loss_mask
    assert (ours - theirs)[mask].abs().mean() < (2e-3 if dtype == "float32" else 5e-2)
    assert torch.cosine_similarity(gradient, expected, dim=0) > (0.9999 if dtype == "float32" else 0.99)
    assert 0.95 < gradient.norm() / expected.norm() < 1.05


def trainer_of_cpu(folder, **settings):
    config = TrainerConfig(device="cpu", **settings)
    return Trainer(folder, ModelConfig(name=str(folder), dtype="float32"), config, seed=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_on_policy_ratio_is_one_and_a_step_raises_the_objective(folder, dtype, optimizer, method):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    trainer = trainer_on_gpu(folder, dtype, optimizer=optimizer, method=method)
    checksum, algorithm = trainer.checksum(), algorithms.parse("grpo")
    batch = packed(sequences(LENGTHS))
    batch = replace(batch, old_logprobs=trainer.score([batch])[0].logprobs)
    first = metrics.values(trainer.forward_backward([batch], algorithm))
    assert first["policy/ratio_mean"] == 1.0 and first["policy/ratio_max"] == 1.0
    trainer.optim_step(step_params(1e-3))
    for _ in range(4):
        trainer.forward_backward([batch], algorithm)
        assert math.isfinite(trainer.optim_step(step_params(1e-3)).grad_norm)
    last = metrics.values(trainer.forward_backward([batch], algorithm))
    assert last["loss/total"] < first["loss/total"] - 1e-3
    assert trainer.checksum() == checksum


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gradient_points_where_the_exact_one_does(folder, dtype):
    found = []
    for trainer in (trainer_on_gpu(folder, dtype), trainer_of_cpu(folder)):
        wake_adapter(trainer)
        trainer.forward_backward([packed(sequences(LENGTHS))], algorithms.parse("grpo"))
        found.append(torch.cat([g.double().cpu().flatten() for g in gradients(trainer).values()]))
    assert torch.cosine_similarity(*found, dim=0) > 0.99
    assert 0.95 < found[0].norm() / found[1].norm() < 1.05


def test_activation_checkpointing_leaves_the_gradient_alone_and_saves_memory(tmp_path):
    folder = save_tiny(tmp_path, initializer_range=0.1, **SIZES | {"num_hidden_layers": 8, "intermediate_size": 1024})
    found, peaks = [], []
    for checkpointing in (False, True):
        trainer = trainer_on_gpu(folder, activation_checkpointing=checkpointing)
        wake_adapter(trainer)
        trainer.memory()
        trainer.forward_backward([packed(sequences([512] * 16))], algorithms.parse("grpo"))
        found.append(torch.cat([gradient.flatten() for gradient in gradients(trainer).values()]))
        peaks.append(trainer.memory()["peak_memory_gib"])
        trainer.close()
    assert (found[0] - found[1]).norm() < 1e-2 * found[0].norm()
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_bfloat16_logprobs_equal_dense_float64(trainable):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 256, generator=generator).bfloat16().cuda().requires_grad_()
    weight = (torch.randn(5003, 256, generator=generator) / 6).bfloat16().cuda().requires_grad_(trainable)
    targets = torch.randint(5003, (64,), generator=generator).cuda()
    coefficients = torch.randn(64, generator=generator).cuda()
    logprobs, entropy = token_logprobs(hidden, weight, targets, chunk=1024, entropy_gradient=True)
    exact, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    table = (exact @ exact_weight.T).log_softmax(-1)
    expected = table.gather(1, targets[:, None]).squeeze(1)
    expected_entropy = -(table.exp() * table).sum(1)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-4)
    (coefficients * (logprobs + entropy)).sum().backward()
    (coefficients.double() * (expected + expected_entropy)).sum().backward()
    assert (hidden.grad.double() - exact.grad).norm() < 5e-3 * exact.grad.norm()
    if trainable:
        assert (weight.grad.double() - exact_weight.grad).norm() < 5e-3 * exact_weight.grad.norm()


def test_peak_memory_does_not_hold_tokens_by_vocabulary():
    tokens, width, vocabulary = 8192, 512, 131_072
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_logprobs(hidden, weight, targets)[0].sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < tokens * vocabulary * 4 / 4  # [T, V] in float32 would be 4 GiB
