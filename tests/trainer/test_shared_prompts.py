"""A prompt computed once for all of its completions against every sequence with a prompt of its own."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from posttrain.kernels.reference import attention as attention_of_segments
from posttrain.rl import algorithms
from posttrain.rl.config import ModelConfig
from posttrain.rl.errors import EngineError
from posttrain.trainer import attention
from posttrain.trainer.model import PackedModel, load_causal_lm
from posttrain.trainer.shared_prompts import lay_out

from .tiny import (
    VOCABULARY,
    gradients,
    keep_norms_exact,
    packed,
    save_tiny,
    sequences,
    step_params,
    trainer_of,
    wake_adapter,
)

CPU = torch.device("cpu")
A = [7, 3, 9, 4, 11, 30, 8, 21, 5]
PROMPTS = {"a": A, "start of a": A[:5], "like a at first": [*A[:6], 1, 2], "one token": [40], "other": [2, 12]}


def members(counts, seed=0, lengths=(6, 1, 4, 9, 2)):
    """(ids, loss mask, advantage) of ``counts[name]`` completions of each prompt, of ``lengths`` in turn."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for name, count in counts.items():
        for index in range(count):
            completion = torch.randint(VOCABULARY, (lengths[index % len(lengths)],), generator=generator)
            ids = torch.cat([torch.tensor(PROMPTS[name]), completion])
            mask = torch.arange(len(ids)) >= len(PROMPTS[name])
            made.append((ids, mask, float(torch.randn((), generator=generator))))
    return made


UNEVEN = {"a": 4, "start of a": 3, "like a at first": 1, "one token": 2, "other": 1}


# --- the layout -------------------------------------------------------------------------------------------------------


def test_a_layout_spelled_out():
    """Prompts [5 6] twice, [5 6 7] once, [5 6] again; a hole in one mask, and a sequence without any loss."""
    ids = torch.tensor([5, 6, 1, 2, 5, 6, 3, 4, 8, 5, 6, 7, 9, 5, 6, 5, 6, 9])
    cu_seqlens = torch.tensor([0, 4, 9, 13, 15, 18])
    positions = torch.tensor([2, 3, 6, 8, 12, 17])
    layout = lay_out(ids, cu_seqlens, positions, share=True)
    # [5 6] | 1 2 | 3 4 8 | 9   and   5 6 7 9
    assert ids[layout.tokens].tolist() == [5, 6, 1, 2, 3, 4, 8, 9, 5, 6, 7, 9]
    assert layout.tokens.tolist() == [0, 1, 2, 3, 6, 7, 8, 17, 9, 10, 11, 12]
    assert (layout.lengths, layout.prompts) == ([2, 2, 3, 1, 4], [0, 0, 0, 0, 4])
    assert layout.rows.tolist() == [1, 2, 1, 5, 10, 1]
    plain = lay_out(ids, cu_seqlens, positions, share=False)
    assert plain.tokens.tolist() == [*range(13), 15, 16, 17]
    assert (plain.lengths, plain.prompts) == ([4, 5, 4, 3], [0, 1, 2, 3])
    assert plain.rows.tolist() == [1, 2, 5, 7, 11, 14]


def test_little_to_save_is_left_alone():
    """One prompt token of two sequences of 17: 1 of 34 is less than 3%; of two sequences of 16, 1 of 32 is more."""
    for length, segments in ((17, 2), (16, 3)):
        ids, cu_seqlens = torch.arange(2 * length) % length, torch.tensor([0, length, 2 * length])
        positions = torch.tensor([*range(1, length), *range(length + 1, 2 * length)])
        assert len(lay_out(ids, cu_seqlens, positions, share=True).lengths) == segments


def test_a_pack_without_loss_has_an_empty_layout():
    layout = lay_out(torch.arange(5), torch.tensor([0, 5]), torch.tensor([], dtype=torch.int64), share=True)
    assert layout.lengths == layout.prompts == layout.tokens.tolist() == layout.rows.tolist() == []


# --- the model --------------------------------------------------------------------------------------------------------


def pair(tmp_path, family, dtype="float64", **settings):
    """A trainer that shares prompts and one that does not, over the same weights."""
    folder = save_tiny(tmp_path, family)
    trainers = [trainer_of(folder, dtype, share_prompts=share, **settings) for share in (True, False)]
    for trainer in trainers:
        wake_adapter(trainer)
        if dtype == "float64":
            keep_norms_exact(trainer._causal_lm)
    return trainers


def tokens_seen(trainer):
    """How many tokens each call of the backbone gets."""
    seen = []
    embedding = trainer._causal_lm.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
@pytest.mark.parametrize("counts", [UNEVEN, {"a": 5}, {"a": 1, "other": 1}], ids=["uneven", "one group", "alone"])
def test_logprobs_and_a_whole_grpo_gradient_are_the_same(tmp_path, family, counts):
    """Windows (4 tokens: Mistral, Gemma 3) end inside the prompt and reach from a completion into it."""
    sharing, plain = pair(tmp_path, family)
    made = members(counts)
    batch = packed(made, temperature=0.8)
    one, two = sharing.score([batch])[0], plain.score([batch])[0]
    assert (one.logprobs != 0).equal(batch.loss_mask)
    torch.testing.assert_close(one.logprobs, two.logprobs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(one.entropy, two.entropy, rtol=1e-11, atol=1e-11)
    algorithm = algorithms.parse({"name": "grpo", "kl_coef": 0.1, "entropy_coef": 0.01})
    noisy = replace(
        batch,
        old_logprobs=two.logprobs + 0.2 * torch.sin(torch.arange(len(batch.input_ids))),
        ref_logprobs=two.logprobs + 0.1 * torch.cos(torch.arange(len(batch.input_ids))),
    )
    figures = [trainer.forward_backward([noisy], algorithm) for trainer in (sharing, plain)]
    assert figures[0]["loss/total"].value() == pytest.approx(figures[1]["loss/total"].value(), rel=1e-11)
    expected = gradients(plain)
    for name, gradient in gradients(sharing).items():
        scale = expected[name].abs().max().item()
        assert scale > 1e-6, name
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-11 * max(scale, 1), msg=name)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_softcap_and_sinks_reach_over_to_the_prompt(tmp_path, family):
    sharing, plain = pair(tmp_path, family, "float32", lora={"target_modules": ["q_proj", "v_proj"]})
    batch = packed(members(UNEVEN))
    one, two = sharing.score([batch])[0], plain.score([batch])[0]
    torch.testing.assert_close(one.logprobs, two.logprobs, rtol=2e-5, atol=2e-5)
    for trainer in (sharing, plain):
        trainer.forward_backward([batch], algorithms.parse("grpo"))
    expected = gradients(plain)
    for name, gradient in gradients(sharing).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=2e-5 * expected[name].abs().max().item())


def test_logprobs_are_the_models_own(tmp_path):
    """One sequence at a time through transformers, for a model whose windows are shorter than the prompt."""
    folder = save_tiny(tmp_path, "gemma3_text")
    shared, own = (load_causal_lm(folder, ModelConfig(name=str(folder), dtype="float64"), CPU) for _ in range(2))
    made = members(UNEVEN)
    batch = packed(made)
    model = PackedModel(shared, CPU, share_prompts=True)
    ours, _ = model.logprobs(
        batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask.nonzero().squeeze(1)
    )
    theirs = []
    for ids, mask, _ in made:
        table = own(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        theirs.append(table.gather(1, ids[1:, None]).squeeze(1)[mask[1:]])
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-6, atol=1e-6)


def test_what_is_computed(tmp_path):
    """4 completions of "a" (6 + 1 + 4 + 9 tokens behind 9), 3 of its start (6 + 1 + 4 behind 5), one alone (6 behind
    8), 2 behind one token (6 + 1), 1 behind two (6); nothing of two sequences that the overlong filter has emptied.
    """
    sharing, plain = pair(tmp_path, "qwen3")
    made = members(UNEVEN)
    expected = plain.score([packed(made)])[0].logprobs
    emptied = [(ids, mask & False, advantage) for ids, mask, advantage in members({"a": 2}, seed=9)]
    batch = packed([made[0], emptied[0], *made[1:], emptied[1]])
    seen = tokens_seen(sharing), tokens_seen(plain)
    one, two = sharing.score([batch])[0].logprobs, plain.score([batch])[0].logprobs
    assert seen == ([(9 + 20) + (5 + 11) + (8 + 6) + (1 + 7) + (2 + 6)], [(4 * 9 + 20) + (3 * 5 + 11) + 14 + 9 + 8])
    torch.testing.assert_close(one[batch.loss_mask], expected[expected != 0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_a_mask_with_holes(tmp_path):
    """What a tool answered stands in the completion and is not trained on: the prompt ends at the first loss token."""
    sharing, plain = pair(tmp_path, "llama")
    made = []
    for ids, mask, advantage in members({"a": 3}, lengths=(9, 7, 8)):
        mask[[len(A) + 2, len(A) + 3, -1]] = False
        made.append((ids, mask, advantage))
    batch = packed(made)
    seen = tokens_seen(sharing)
    assert (sharing.score([batch])[0].logprobs != 0).equal(batch.loss_mask) and seen == [9 + 24]
    for trainer in (sharing, plain):
        trainer.forward_backward([batch], algorithms.parse("grpo"))
    expected = gradients(plain)
    for name, gradient in gradients(sharing).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11)


def test_no_loss_at_all_is_no_work_and_no_gradient(tmp_path):
    sharing, _ = pair(tmp_path, "qwen3")
    seen = tokens_seen(sharing)
    batch = packed([(ids, mask & False, advantage) for ids, mask, advantage in members({"a": 2})])
    batch = replace(batch, num_loss_tokens=8, num_sequences=2)
    assert not sharing.score([batch])[0].logprobs.any()
    sharing.forward_backward([batch], algorithms.parse("grpo"))
    assert seen == [] and all(gradient is None for gradient in gradients(sharing).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_policy_ratio_is_exactly_one(tmp_path, dtype):
    sharing, _ = pair(tmp_path, "qwen3", dtype)
    batch = packed(members(UNEVEN))
    ratios = []

    class Spy:
        needs_entropy_gradient = False

        def loss(self, inputs):
            ratios.append(torch.exp(inputs.logprobs - inputs.old_logprobs).detach())
            return algorithms.LossOutput(inputs.logprobs.sum())

    sharing.forward_backward([replace(batch, old_logprobs=sharing.score([batch])[0].logprobs)], Spy())
    assert torch.equal(ratios[0], torch.ones_like(ratios[0]))


def test_recomputed_layers_share_too(tmp_path):
    sharing, plain = pair(tmp_path, "gemma3_text", activation_checkpointing=True)
    for trainer in (sharing, plain):
        trainer.forward_backward([packed(members(UNEVEN))], algorithms.parse("gspo"))
    expected = gradients(plain)
    for name, gradient in gradients(sharing).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11)


def test_any_split_into_micro_batches_gives_the_same_gradient(tmp_path):
    sharing, _ = pair(tmp_path, "qwen3")
    made, found = members(UNEVEN), []
    for cuts in ([0, 11], [0, 2, 7, 11], [0, 1, 3, 4, 5, 6, 11]):
        for low, high in pairwise(cuts):
            sharing.forward_backward([packed(made[low:high], made, len(cuts) - 1)], algorithms.parse("grpo"))
        found.append(gradients(sharing))
    for other in found[1:]:
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, found[0][name], rtol=1e-9, atol=1e-11)


def test_a_model_that_cannot_be_packed_computes_every_prompt_and_says_so(tmp_path, caplog):
    folder = save_tiny(tmp_path, "mamba", state_size=4, expand=2, time_step_rank=4)
    model = load_causal_lm(folder, ModelConfig(name=str(folder), dtype="float32"), CPU)
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        model = PackedModel(model, CPU, share_prompts=True)
    assert not model.shares and caplog.text.count("prompts are not shared") == 1


def test_rope_that_depends_on_the_length_is_not_shared_beyond_it(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 12}
    folder = save_tiny(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=12)
    sharing, plain = (trainer_of(folder, share_prompts=share) for share in (True, False))
    batch = packed(members({"a": 3}, lengths=(9, 5, 7)))
    seen = tokens_seen(sharing)
    torch.testing.assert_close(sharing.score([batch])[0].logprobs, plain.score([batch])[0].logprobs, rtol=0, atol=0)
    assert seen == [18, 14, 16]
    sharing.score([packed(members({"start of a": 3}, lengths=(7, 5, 2)))])
    assert seen[3:] == [5 + 14]


def test_attention_that_loses_the_prompt_is_noticed(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path, "llama")
    model = load_causal_lm(folder, ModelConfig(name=str(folder), dtype="float32"), CPU)

    def forgetful(q, k, v, segments, **options):
        return attention_of_segments(q, k, v, replace(segments, prompts=tuple(range(len(segments.prompts)))), **options)

    monkeypatch.setattr(attention.reference, "attention", forgetful)
    with pytest.raises(EngineError, match=r"moves their hidden states by .* trainer\.share_prompts = false"):
        PackedModel(model, CPU, share_prompts=True)
    PackedModel(load_causal_lm(folder, ModelConfig(name=str(folder), dtype="float32"), CPU), CPU)


def test_a_step_with_and_without(tmp_path):
    sharing, plain = pair(tmp_path, "qwen3")
    made = [*members(UNEVEN), *sequences([5, 1, 8])]
    for trainer in (sharing, plain):
        for _ in range(3):
            trainer.forward_backward([packed(made)], algorithms.parse("grpo"))
            trainer.optim_step(step_params())
    one, two = sharing.export_adapter().tensors, plain.export_adapter().tensors
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-7)
