"""The trainer's verbs on tiny models in float64: gradients against plain transformers, splits, safety checks."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.rl import algorithms, metrics
from posttrain.rl.config import ModelConfig, TrainerConfig
from posttrain.rl.errors import EngineError, OutOfMemory
from posttrain.trainer.trainer import Trainer

from .tiny import VOCABULARY, gradients, packed, save_tiny, sequences, step_params, trainer_of, wake_adapter

LENGTHS = [3, 9, 2, 14, 6, 1, 11]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("qwen3"))


def flat(found):
    return torch.cat([gradient.flatten() for _, gradient in sorted(found.items())])


def relative(one, two):
    return ((one - two).norm() / two.norm()).item()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_on_policy_ratio_is_exactly_one(folder, dtype, method):
    trainer = trainer_of(folder, dtype, method=method)
    wake_adapter(trainer)
    batch = packed(sequences(LENGTHS), temperature=0.8)
    scores = trainer.score([batch])[0]
    seen = {}

    class Spy:
        needs_entropy_gradient = True

        def loss(self, inputs):
            seen.update(
                ratio=torch.exp(inputs.logprobs - inputs.old_logprobs).detach(), entropy=inputs.entropy.detach()
            )
            return algorithms.LossOutput(inputs.logprobs.sum())

    trainer.forward_backward([replace(batch, old_logprobs=scores.logprobs)], Spy())
    assert torch.equal(seen["ratio"], torch.ones_like(seen["ratio"]))
    assert torch.equal(seen["entropy"], scores.entropy)
    assert torch.equal(scores.logprobs != 0, batch.loss_mask)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_any_split_into_micro_batches_gives_the_same_gradient(folder, name, method):
    trainer = trainer_of(folder, method=method)
    wake_adapter(trainer)
    algorithm = algorithms.parse(name)
    made = sequences(LENGTHS)
    noise = torch.linspace(-0.3, 0.3, sum(LENGTHS))
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    old = trainer.score([packed(made)])[0].logprobs + noise

    def gradient(order, cuts):
        bounds = [0, *cuts, len(order)]
        batches = []
        for low, high in pairwise(bounds):
            members = order[low:high]
            old_part = torch.cat([old[starts[i] : starts[i + 1]] for i in members])
            batches.append(packed([made[i] for i in members], made, len(bounds) - 1, old_logprobs=old_part))
        for batch in batches:  # one call each: gradients add up over calls too
            trainer.forward_backward([batch], algorithm)
        return flat(gradients(trainer))

    whole = gradient([0, 1, 2, 3, 4, 5, 6], [])
    assert whole.norm() > 1e-3
    assert relative(gradient([0, 1, 2, 3, 4, 5, 6], [2, 4]), whole) < 1e-9
    assert relative(gradient([6, 2, 0, 5, 1, 4, 3], [1, 2, 3, 4, 5, 6]), whole) < 1e-9


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
def test_gradient_equals_naive_transformers(folder, checkpointing):
    """Full fine-tuning with GRPO, written out with the model's own logits, one sequence at a time."""
    trainer = trainer_of(folder, method="full", activation_checkpointing=checkpointing)
    made = sequences([9, 14, 6])
    ratio_noise = 0.15
    naive = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    total, old_parts = 0.0, []
    for ids, mask, advantage in made:
        table = (naive(input_ids=ids[None]).logits[0, :-1] / 0.9).log_softmax(-1)
        logprobs = table.gather(1, ids[1:, None]).squeeze(1)[mask[1:]]
        old = logprobs.detach() + ratio_noise * torch.linspace(-2, 2, len(logprobs)).double()
        ratio = torch.exp(logprobs - old)
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        total = total - surrogate.mean() / len(made)
        whole = torch.zeros(len(ids), dtype=torch.float64)
        whole[mask] = old
        old_parts.append(whole)
    total.backward()
    batch = packed(made, temperature=0.9, old_logprobs=torch.cat(old_parts))
    found = trainer.forward_backward([batch], algorithms.parse("grpo"))
    assert found["loss/total"].value() == pytest.approx(total.item(), rel=1e-6)
    assert found["policy/clip_fraction"].value() > 0
    expected = {name: parameter.grad for name, parameter in naive.named_parameters()}
    ours = gradients(trainer)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        # advantages travel in float32
        assert relative(gradient, expected[name]) < 1e-6, name


def test_lora_gradient_is_the_projection_of_the_full_one(folder):
    """∂/∂B = scaling · (∂/∂W) Aᵀ and ∂/∂A = scaling · Bᵀ (∂/∂W), with ∂/∂W from a model with the adapter merged."""
    trainer = trainer_of(folder, lora={"rank": 3, "alpha": 6.0})
    wake_adapter(trainer)
    batch = packed(sequences([9, 14, 6]))
    trainer.forward_backward([batch], algorithms.parse("grpo"))
    ours = gradients(trainer)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    pairs = {}
    for name, tensor in trainer.export_adapter().tensors.items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        pairs.setdefault(module, {})[part[0]] = (name, tensor)
    with torch.no_grad():
        for module, pair in pairs.items():
            merged.get_parameter(f"{module}.weight").add_(2.0 * pair["B"][1] @ pair["A"][1])
    merged.save_pretrained(folder / "merged")
    full = trainer_of(folder / "merged", method="full")
    full.forward_backward([batch], algorithms.parse("grpo"))
    expected = gradients(full)
    assert len(pairs) == 14
    for module, pair in pairs.items():
        weight = expected[f"{module}.weight"]
        assert relative(ours[pair["B"][0]], 2.0 * weight @ pair["A"][1].T) < 1e-6, module
        assert relative(ours[pair["A"][0]], 2.0 * pair["B"][1].T @ weight) < 1e-6, module


@pytest.mark.parametrize("method", ["lora", "full"])
def test_activation_checkpointing_leaves_the_gradient_alone(folder, method):
    found = []
    for checkpointing in (False, True):
        trainer = trainer_of(folder, method=method, activation_checkpointing=checkpointing)
        wake_adapter(trainer)
        calls = []
        trainer._causal_lm.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.forward_backward([packed(sequences(LENGTHS))], algorithms.parse("grpo"))
        assert len(calls) == 1 + checkpointing
        found.append(flat(gradients(trainer)))
    assert torch.equal(found[0], found[1])


def test_entropy_bonus_has_its_gradient(folder):
    algorithm = algorithms.parse({"name": "dapo" if "dapo" in algorithms.ALGORITHMS else "grpo", "entropy_coef": 0.5})
    trainer = trainer_of(folder, method="full")
    made = [(ids, mask, 0.0) for ids, mask, _ in sequences([9])]  # no advantage: only the bonus is left
    trainer.forward_backward([packed(made)], algorithm)
    ours = flat(gradients(trainer))
    naive = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids, mask, _ = made[0]
    table = naive(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    (-0.5 * -(table.exp() * table).sum(-1)[mask[1:]].mean()).backward()
    expected = flat({name: parameter.grad for name, parameter in naive.named_parameters()})
    assert relative(ours, expected) < 1e-9


def test_only_tokens_in_the_loss_reach_the_head(folder, monkeypatch):
    seen = []
    batch = packed(sequences(LENGTHS))
    trainer = trainer_of(folder)
    original = trainer._model._token_logprobs
    monkeypatch.setattr(
        trainer._model, "_token_logprobs", lambda rows, *a, **k: seen.append(len(rows)) or original(rows, *a, **k)
    )
    trainer.forward_backward([batch], algorithms.parse("grpo"))
    assert seen == [int(batch.loss_mask.sum())] and seen[0] < len(batch.input_ids)


def test_a_step_moves_the_adapter_and_not_the_base(folder):
    trainer = trainer_of(folder, "float32")
    before, checksum = trainer.export_adapter(), trainer.checksum()
    base = {name: tensor.clone() for name, tensor in trainer.base_weights().items()}
    for expected in (1, 2):
        trainer.forward_backward([packed(sequences(LENGTHS))], algorithms.parse("grpo"))
        result = trainer.optim_step(step_params())
        assert result.policy_version == expected and result.grad_norm > 0
    after = trainer.export_adapter()
    assert (before.policy_version, after.policy_version, after.kind) == (0, 2, "lora")
    assert all(not torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    assert trainer.checksum() == checksum
    assert all(torch.equal(base[name], tensor) for name, tensor in trainer.base_weights().items())
    assert all(weight.grad is None for weight in trainer._weights.values())


def test_checksum_sees_a_changed_bit_and_a_swap(folder):
    trainer = trainer_of(folder, "float32")
    checksum = trainer.checksum()
    weight = trainer.base_weights()["model.layers.0.mlp.up_proj.weight"]
    original = weight.clone()
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    assert trainer.checksum() != checksum
    weight.copy_(original)
    weight[[0, 1]] = weight[[1, 0]]
    assert trainer.checksum() != checksum
    weight.copy_(original)
    assert trainer.checksum() == checksum
    assert trainer_of(folder, "float32", method="full").checksum() == ""


def test_base_weights_have_plain_names_and_share_memory(folder):
    trainer = trainer_of(folder, "float32")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = trainer.base_weights()
    assert base.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(base[name], parameter)
    assert base["model.norm.weight"].data_ptr() == trainer._causal_lm.model.norm.weight.data_ptr()
    assert trainer_of(folder, "float32", method="full").base_weights() == {}


def test_export_is_a_copy(folder):
    trainer = trainer_of(folder, "float32")
    adapter = trainer.export_adapter()
    kept = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    with torch.no_grad():
        for weight in trainer._weights.values():
            weight.add_(1.0)
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in kept.items())


def test_reference_is_the_model_without_its_adapter(folder):
    trainer = trainer_of(folder)
    batch = packed(sequences(LENGTHS))
    fresh = trainer.score([batch])[0]  # B is 0: the adapter changes nothing yet
    wake_adapter(trainer)
    moved = trainer.score([batch])[0]
    reference = trainer.score([batch], reference=True)[0]
    assert torch.equal(reference.logprobs, fresh.logprobs)
    assert (moved.logprobs - fresh.logprobs).abs().max() > 1e-3
    assert torch.equal(trainer.score([batch])[0].logprobs, moved.logprobs)
    trainer.forward_backward([batch], algorithms.parse("grpo"))
    assert all(gradient is not None for gradient in gradients(trainer).values())


def test_full_fine_tuning_has_no_reference(folder):
    trainer = trainer_of(folder, method="full")
    with pytest.raises(EngineError, match="no base model"):
        trainer.score([packed(sequences([4]))], reference=True)


def test_nan_outside_the_loss_is_harmless(folder):
    trainer = trainer_of(folder)
    wake_adapter(trainer)
    batch = packed(sequences(LENGTHS))
    clean = trainer.score([batch])[0].logprobs + 0.05
    dirty = torch.where(batch.loss_mask, clean, math.nan)
    found = []
    for values in (clean, dirty):
        filled = replace(batch, rollout_logprobs=values, old_logprobs=values, ref_logprobs=values)
        parts = trainer.forward_backward([filled], algorithms.parse({"name": "grpo", "kl_coef": 0.1}))
        assert all(math.isfinite(value) for value in metrics.values(parts).values())
        found.append(flat(gradients(trainer)))
    assert torch.equal(found[0], found[1]) and found[0].norm() > 0


def test_a_gradient_that_is_not_finite_is_named_and_nothing_moves(folder):
    trainer = trainer_of(folder, "float32")
    batch = packed(sequences(LENGTHS))
    broken = replace(batch, advantages=torch.where(batch.loss_mask, math.nan, 0.0))
    before = trainer.export_adapter().tensors
    trainer.forward_backward([broken], algorithms.parse("grpo"))
    with pytest.raises(EngineError, match=r"gradient of base_model\.model\..*lora_. *.*is not finite"):
        trainer.optim_step(step_params())
    after = trainer.export_adapter()
    assert after.policy_version == 0
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.items())
    trainer.forward_backward([batch], algorithms.parse("grpo"))
    assert math.isfinite(trainer.optim_step(step_params()).grad_norm)


def test_mean_entropy_is_over_loss_tokens(folder):
    trainer = trainer_of(folder)
    made = sequences(LENGTHS)
    batches = [packed(made[:3], made, 2), packed(made[3:], made, 2)]
    entropy = torch.cat([s.entropy[b.loss_mask] for s, b in zip(trainer.score(batches), batches)])
    found = trainer.forward_backward(batches, algorithms.parse("grpo"))
    assert found["policy/entropy"].value() == pytest.approx(entropy.mean().item(), rel=1e-9)
    assert 0 < entropy.mean() < math.log(VOCABULARY)


def test_a_micro_batch_without_loss_tokens_adds_nothing(folder):
    trainer = trainer_of(folder)
    wake_adapter(trainer)
    made = sequences([9, 14])
    trainer.forward_backward([packed(made)], algorithms.parse("grpo"))
    expected = flat(gradients(trainer))
    empty = packed([(ids, torch.zeros_like(mask), 0.0) for ids, mask, _ in sequences([4], seed=3)], made)
    trainer.forward_backward([packed(made), empty], algorithms.parse("grpo"))
    assert torch.equal(flat(gradients(trainer)), expected)
    assert torch.equal(trainer.score([empty])[0].logprobs, torch.zeros(4, dtype=torch.float64))


def test_dropout_in_the_configuration_is_never_active(tmp_path):
    folder = save_tiny(tmp_path, "llama", attention_dropout=0.5)
    trainer = trainer_of(folder, activation_checkpointing=True)
    wake_adapter(trainer)
    batch = packed(sequences(LENGTHS))
    found = []
    for _ in range(2):
        trainer.forward_backward([batch], algorithms.parse("grpo"))
        found.append(flat(gradients(trainer)))
    assert torch.equal(found[0], found[1])


def test_close_twice_and_memory(folder):
    trainer = trainer_of(folder, "float32")
    assert 0.01 < trainer.memory()["peak_memory_gib"] < 100
    trainer.close()
    trainer.close()


class Exhausted:
    """The algorithm whose n-th call finds no memory; remembers what the call held."""

    needs_entropy_gradient = True

    def __init__(self, call, message="CUDA out of memory. Tried to allocate 2.00 GiB", kind=torch.OutOfMemoryError):
        self.left, self.message, self.kind, self.held = call, message, kind, None

    def loss(self, inputs):
        self.left -= 1
        if self.left == 0:
            self.held = weakref.ref(inputs.logprobs)
            raise self.kind(self.message)
        return algorithms.parse("grpo").loss(inputs)


def test_out_of_memory_says_how_large_the_micro_batch_was_and_keeps_nothing(folder):
    trainer = trainer_of(folder)
    wake_adapter(trainer)
    made = sequences(LENGTHS)
    batches = [packed(made[:4], made, 2), packed(made[4:], made, 2)]
    trainer.forward_backward(batches, algorithms.parse("grpo"))
    expected = gradients(trainer)
    weights = trainer.export_adapter().tensors
    exhausted = Exhausted(2)
    with pytest.raises(OutOfMemory, match=r"a micro-batch of 18 tokens: CUDA out of memory\. Tried") as caught:
        trainer.forward_backward(batches, exhausted)
    assert exhausted.held() is None, "the failed pass is still held"
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    trainer.clear_gradients()
    assert all(weight.grad is None for weight in trainer._weights.values())
    assert all(torch.equal(weights[name], weight) for name, weight in trainer.export_adapter().tensors.items())
    trainer.forward_backward(batches, algorithms.parse("grpo"))
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(trainer).items())


@pytest.mark.parametrize("verb", ["score", "optim_step"])
def test_out_of_memory_elsewhere_is_named_too(folder, monkeypatch, verb):
    trainer = trainer_of(folder)

    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(trainer._model, "logprobs", fail)
    monkeypatch.setattr(trainer._optimizer, "step", fail)
    if verb == "score":
        with pytest.raises(OutOfMemory, match=r"a micro-batch of 9 tokens: .*ALLOC_FAILED"):
            trainer.score([packed(sequences([9]))])
    else:
        with pytest.raises(OutOfMemory, match="the optimizer step"):
            trainer.optim_step(step_params())
        assert trainer.policy_version == 0


@pytest.mark.parametrize("part", ["load_causal_lm", "lora.attach", "Optimizer", "PackedModel"])
def test_a_trainer_that_does_not_fit_says_so(folder, monkeypatch, part):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")

    monkeypatch.setattr(f"posttrain.trainer.trainer.{part}", fail)
    with pytest.raises(OutOfMemory) as caught:
        trainer_of(folder)
    assert str(caught.value) == (
        "the GPU's memory does not suffice for the trainer (end what else uses the GPU, or take a smaller model or "
        "trainer.lora.rank): CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_other_runtime_errors_pass_unchanged(folder):
    wrong = Exhausted(1, "mat1 and mat2 shapes cannot be multiplied", RuntimeError)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied$") as caught:
        trainer_of(folder).forward_backward([packed(sequences([9]))], wrong)
    assert type(caught.value) is RuntimeError


def test_clear_gradients_reaches_the_float32_masters(folder):
    trainer = trainer_of(folder, "bfloat16", method="full")
    trainer.forward_backward([packed(sequences(LENGTHS))], algorithms.parse("grpo"))
    assert any(master.grad is not None for master in trainer._optimizer.targets().values())
    trainer.clear_gradients()
    assert all(master.grad is None for master in trainer._optimizer.targets().values())


class TwoRanks:
    """Stands for a second trainer with the same gradients."""

    def __init__(self):
        self.calls = []

    def connect(self, device):
        self.calls.append(("connect", device.type))

    def sum_gradients(self, weights):
        self.calls.append(("sum", len(weights)))
        for weight in weights.values():
            weight.grad.mul_(2)

    def close(self):
        self.calls.append(("close",))


def test_gradients_are_summed_over_the_ranks_before_clipping(folder):
    ranks = TwoRanks()
    model = ModelConfig(name=str(folder), dtype="float64")
    trainer = Trainer(folder, model, TrainerConfig(device="cpu"), seed=0, ranks=ranks)
    alone = trainer_of(folder)
    for one in (trainer, alone):
        wake_adapter(one)
        one.forward_backward([packed(sequences(LENGTHS))], algorithms.parse("grpo"))
    norms = [one.optim_step(step_params(max_grad_norm=1e-3)).grad_norm for one in (trainer, alone)]
    assert norms[0] == pytest.approx(2 * norms[1], rel=1e-12)
    trainer.close()
    trainer.close()
    assert ranks.calls == [("connect", "cpu"), ("sum", 28), ("close",)]
