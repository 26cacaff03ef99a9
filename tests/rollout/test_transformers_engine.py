"""What only the embedded engine does: shared base weights, full weights, chunks, other architectures."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from posttrain.rl.config import ModelConfig, RolloutConfig
from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import fingerprint
from posttrain.rl.types import Adapter, Prompt, SamplingParams
from posttrain.rollout.transformers_engine import TransformersEngine
from tests.rollout.conftest import LORA, VOCABULARY, make_adapter, reference_logits, save_tiny_model

PROMPTS = [Prompt("a", "", {}, (7, 8, 9)), Prompt("b", "", {}, tuple(range(3, 25))), Prompt("c", "", {}, (20,))]
PARAMS = SamplingParams(max_tokens=10)


def start(folder: Path, base: dict[str, torch.Tensor] | None = None, max_sequences: int = 64) -> TransformersEngine:
    rollout = RolloutConfig(max_sequences=max_sequences)
    return TransformersEngine(folder, ModelConfig(name=str(folder)), rollout, base_weights=base)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), tied=request.param)


@pytest.fixture(scope="module")
def plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_shared_base_exists_once_and_samples_like_a_loaded_one(folder: Path, plain: torch.nn.Module) -> None:
    base = dict(plain.named_parameters())
    engine = start(folder, base)
    held = dict(engine.model.named_parameters())
    assert held.keys() == base.keys()
    assert {name: tensor.data_ptr() for name, tensor in held.items()} == {n: t.data_ptr() for n, t in base.items()}
    assert engine.generate(PROMPTS, 3, PARAMS) == start(folder).generate(PROMPTS, 3, PARAMS)


def test_shared_base_takes_a_state_dict_with_the_tied_head_named_twice(folder: Path, plain: torch.nn.Module) -> None:
    engine = start(folder, plain.state_dict())
    head, embedding = engine.model.lm_head.weight, engine.model.model.embed_tokens.weight
    assert (head is embedding) == plain.config.tie_word_embeddings
    assert head.data_ptr() == plain.lm_head.weight.data_ptr()


def test_trainer_parameters_are_left_alone(folder: Path) -> None:
    trainer = AutoModelForCausalLM.from_pretrained(folder).train()
    before = {name: tensor.clone() for name, tensor in trainer.named_parameters()}
    engine = start(folder, dict(trainer.named_parameters()))
    engine.load_adapter(make_adapter(folder, 1))
    engine.generate(PROMPTS, 1, PARAMS)
    engine.close()
    assert trainer.training
    assert all(tensor.requires_grad and not tensor.is_inference() for tensor in trainer.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.named_parameters())
    assert {name for name, _ in trainer.named_parameters()} == before.keys()


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_shared_weights_that_do_not_fit_are_refused(folder: Path, plain: torch.nn.Module, change: str) -> None:
    base = dict(plain.named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del base[name]
    elif change == "unexpected":
        base["model.layers.1.mlp.extra.weight"] = base[name]
    else:
        base[name] = base[name][:-1]
    with pytest.raises(EngineError, match="do not fit"):
        start(folder, base)


def test_loading_an_adapter_draws_no_random_numbers_and_copies_the_tensors(folder: Path) -> None:
    engine = start(folder)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    adapter = make_adapter(folder, 1)
    torch.manual_seed(3)
    first = engine.load_adapter(adapter)
    assert torch.equal(torch.rand(4), expected)
    before = engine.generate(PROMPTS, 2, PARAMS)
    for tensor in adapter.tensors.values():
        tensor.add_(1.0)  # as the trainer's next step would
    assert engine.generate(PROMPTS, 2, PARAMS) == before
    held = {name: parameter for name, parameter in engine.model.named_parameters() if ".lora_" in name}
    pointers = {tensor.data_ptr() for tensor in held.values()}
    assert engine.load_adapter(adapter) == fingerprint(adapter.tensors) != first
    assert pointers == {p.data_ptr() for n, p in engine.model.named_parameters() if ".lora_" in n}  # in place


def test_fingerprint_is_of_what_the_modules_hold(folder: Path) -> None:
    engine = start(folder)
    adapter = make_adapter(folder, 1)
    engine.load_adapter(adapter)
    inside = {}
    for name, module in engine.model.named_modules():
        if hasattr(module, "lora_A"):
            inside[f"base_model.model.{name}.lora_A.weight"] = module.lora_A["default"].weight
            inside[f"base_model.model.{name}.lora_B.weight"] = module.lora_B["default"].weight
    assert fingerprint(inside) == fingerprint(adapter.tensors)


def test_adapter_type_and_rank_stabilised_scaling_are_kept(folder: Path, plain: torch.nn.Module) -> None:
    config = {**LORA, "use_rslora": True}
    tensors = {name: tensor.double() for name, tensor in make_adapter(folder, 1).tensors.items()}
    engine = start(folder)
    assert engine.load_adapter(Adapter(1, "lora", tensors, config)) == fingerprint(tensors)
    scaling = {m.scaling["default"] for m in engine.model.modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")}
    assert scaling == {6 / 2}


@pytest.mark.parametrize("extra", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=str)
def test_adapter_kinds_that_are_not_plain_lora_are_refused(folder: Path, extra: dict[str, object]) -> None:
    adapter = make_adapter(folder, 1)
    with pytest.raises(EngineError, match="plain LoRA"):
        start(folder).load_adapter(Adapter(1, "lora", adapter.tensors, {**LORA, **extra}))


def test_changed_adapter_configuration_is_refused(folder: Path) -> None:
    engine, adapter = start(folder), make_adapter(folder, 1)
    engine.load_adapter(adapter)
    with pytest.raises(EngineError, match="configuration changed"):
        engine.load_adapter(Adapter(2, "lora", adapter.tensors, {**LORA, "lora_alpha": 7}))


def test_full_weights_are_overwritten_in_place(folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path, tied=AutoConfig.from_pretrained(folder).tie_word_embeddings, seed=9)
    engine = start(folder)
    pointers = [parameter.data_ptr() for parameter in engine.model.parameters()]
    tensors = dict(AutoModelForCausalLM.from_pretrained(other).named_parameters())
    assert engine.load_adapter(Adapter(4, "full", tensors, {})) == fingerprint(tensors)
    assert [parameter.data_ptr() for parameter in engine.model.parameters()] == pointers
    result = engine.generate(PROMPTS, 2, PARAMS)
    expected = start(other).generate(PROMPTS, 2, PARAMS)
    assert [[c.completion_ids for c in group] for group in result] == [
        [c.completion_ids for c in group] for group in expected
    ]
    assert result[0][0].policy_version == 4
    del tensors["model.norm.weight"]
    with pytest.raises(EngineError, match=r"missing model\.norm\.weight"):
        engine.load_adapter(Adapter(5, "full", tensors, {}))


def test_full_weights_over_a_shared_base_are_refused(folder: Path, plain: torch.nn.Module) -> None:
    base = dict(plain.named_parameters())
    with pytest.raises(EngineError, match="shared"):
        start(folder, base).load_adapter(Adapter(1, "full", base, {}))


@pytest.mark.parametrize("max_sequences", [1, 3, 7])
def test_samples_do_not_depend_on_how_many_rows_are_decoded_at_once(folder: Path, max_sequences: int) -> None:
    params = SamplingParams(max_tokens=12, stop_token_ids=(1, 5, 9, 30))
    whole = start(folder).generate(PROMPTS, 4, params)
    parts = start(folder, max_sequences=max_sequences).generate(PROMPTS, 4, params)
    for left, right in zip(chain(*whole), chain(*parts)):
        assert (left.completion_ids, left.text, left.finish_reason) == (
            right.completion_ids,
            right.text,
            right.finish_reason,
        )
        assert left.rollout_logprobs == pytest.approx(right.rollout_logprobs, abs=1e-5)


def test_finished_rows_leave_the_batch(folder: Path) -> None:
    engine = start(folder)
    widths = []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    engine.generate(PROMPTS, 8, SamplingParams(max_tokens=20, stop_token_ids=tuple(range(1, 20))))
    assert widths[0] == 3  # each prompt once
    assert widths[1] <= 24 and widths[-1] <= 4
    assert widths[1:] == sorted(widths[1:], reverse=True)


def test_float64_logprobs_keep_their_digits(folder: Path) -> None:
    engine = TransformersEngine(folder, ModelConfig(name=str(folder), dtype="float64"), RolloutConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, 2, PARAMS)):
        for completion in group:
            expected = reference_logits(model, prompt, completion).log_softmax(-1)
            chosen = expected.gather(1, torch.tensor(completion.completion_ids)[:, None])[:, 0]
            assert completion.rollout_logprobs == pytest.approx(chosen.tolist(), abs=1e-12)


def test_logits_that_are_not_finite_are_an_error(folder: Path) -> None:
    engine = start(folder)
    with torch.no_grad():
        engine.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(EngineError, match="not finite"):
        engine.generate(PROMPTS, 1, PARAMS)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3}
ARCHITECTURES = {
    "llama": WIDE,
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3},
    "mistral": {**WIDE, "sliding_window": 6},
    "gemma2": {**WIDE, "sliding_window": 4, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0},
    "gemma3_text": {**WIDE, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_5_text": {
        **WIDE,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_agree_with_a_full_forward_pass(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """Absolute positions, sliding windows and recurrent states, each with left padding and dropped rows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **ARCHITECTURES[name], bos_token_id=None, eos_token_id=1, pad_token_id=0)
    options = {"attn_implementation": "eager"} if name == "gemma2" else {}  # the definition, its cap on scores included
    model = AutoModelForCausalLM.from_config(config, **options).float().eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    engine = start(tmp_path, dict(model.named_parameters()))
    params = SamplingParams(max_tokens=14, stop_token_ids=(1, 4, 9, 22, 30))
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, 4, params)):
        for completion in group:
            expected = reference_logits(model, prompt, completion).log_softmax(-1)
            chosen = expected.gather(1, torch.tensor(completion.completion_ids)[:, None])[:, 0]
            assert completion.rollout_logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
