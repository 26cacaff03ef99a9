"""Activation checkpointing and what of it waits in host memory: the same gradients, and little kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.rl import algorithms
from posttrain.rl.errors import EngineError
from posttrain.trainer import offload
from posttrain.trainer.offload import HostMemory, checkpoint_layers
from tests.trainer.tiny import gradients, packed, save_tiny, sequences, step_params, trainer_of, wake_adapter

LAYERS, LENGTHS = 4, (9, 14, 6)
SCHEMES = {
    "kept": {"activation_checkpointing": True},
    "offloaded": {"activation_checkpointing": True, "offload_activations": True},
}
GEMMA = {"layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """1,000 bytes: what is copied lies across several, as it may with a large model."""
    monkeypatch.setattr(offload, "SEGMENT", 1000)


def model_folder(tmp_path, family="qwen3"):
    changes = GEMMA if family == "gemma3_text" else {}
    return save_tiny(tmp_path / family, family, num_hidden_layers=LAYERS, **changes)


def decoder_layers(trainer):
    return trainer._causal_lm.get_decoder().layers


def host_memory(trainer):
    return decoder_layers(trainer)[0].forward._memory


def gradients_of(folder, batches, dtype="float32", **settings):
    trainer = trainer_of(folder, dtype, **settings)
    wake_adapter(trainer)
    trainer.forward_backward(batches, algorithms.parse("grpo"))
    return gradients(trainer)


def assert_bitwise(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None and torch.equal(found[name], gradient), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text"])
def test_gradients_of_two_micro_batches_are_bitwise_those_of_the_plain_model(tmp_path, family, scheme):
    folder = model_folder(tmp_path, family)
    made = sequences([*LENGTHS, 11])
    batches = [packed(made[:2], made, 2), packed(made[2:], made, 2)]
    expected = gradients_of(folder, batches)
    assert sum(gradient.norm() for gradient in expected.values()) > 1e-2
    assert_bitwise(gradients_of(folder, batches, **SCHEMES[scheme]), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_full_fine_tuning_in_half_precision_has_the_same_float32_gradients(tmp_path, scheme):
    """Each weight's gradient is moved to its master by a hook, after every backward pass."""
    folder = model_folder(tmp_path)
    batches = [packed(sequences(LENGTHS)), packed(sequences(LENGTHS, seed=1))]
    masters = []
    for settings in ({}, SCHEMES[scheme]):
        trainer = trainer_of(folder, "bfloat16", method="full", **settings)
        trainer.forward_backward(batches, algorithms.parse("grpo"))
        masters.append({name: master.grad for name, master in trainer._optimizer.targets().items()})
    assert all(gradient.dtype == torch.float32 for gradient in masters[0].values())
    assert_bitwise(masters[1], masters[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sequences_that_are_run_one_at_a_time(tmp_path, scheme):
    folder = model_folder(tmp_path)
    found = []
    for settings in ({}, SCHEMES[scheme]):
        trainer = trainer_of(folder, "float32", share_prompts=False, **settings)
        wake_adapter(trainer)
        trainer._model.packs = False
        trainer._causal_lm.set_attn_implementation(trainer._model._own_attention)
        trainer.forward_backward([packed(sequences(LENGTHS))], algorithms.parse("grpo"))
        found.append(gradients(trainer))
    assert_bitwise(found[1], found[0])


class Watching:
    """The algorithm that is called between the forward and the backward pass and looks around there."""

    needs_entropy_gradient = False

    def __init__(self, look):
        self.look = look

    def loss(self, inputs):
        self.look()
        return algorithms.parse("grpo").loss(inputs)


@pytest.mark.parametrize(("scheme", "alive"), [("kept", {0, 1, 2, 3}), ("offloaded", {3})])
def test_which_layer_inputs_are_on_the_device_between_forward_and_backward(tmp_path, scheme, alive):
    trainer = trainer_of(model_folder(tmp_path), "float32", **SCHEMES[scheme])
    wake_adapter(trainer)
    seen = {}
    for index, layer in enumerate(decoder_layers(trainer)):
        layer.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: weakref.ref(args[0])}))
    found = []

    def look():
        gc.collect()
        found.append({index for index, tensor in seen.items() if tensor() is not None})

    trainer.forward_backward([packed(sequences(LENGTHS))], Watching(look))
    assert found == [alive]
    gc.collect()
    assert all(tensor() is None for tensor in seen.values())


def test_autograd_keeps_nothing_of_a_layer_but_its_input(tmp_path):
    trainer = trainer_of(model_folder(tmp_path), "float32", **SCHEMES["kept"])
    wake_adapter(trainer)
    tokens, width = sum(LENGTHS), 32
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        trainer._causal_lm.get_decoder().layers[1](
            torch.randn(1, tokens, width),
            attention_mask=None,
            position_embeddings=(torch.ones(1, tokens, 16), torch.zeros(1, tokens, 16)),
            packing=trainer._model._packing([tokens]),
        )
    activations = [tensor for tensor in kept if not isinstance(tensor, nn.Parameter)]
    assert [tuple(tensor.shape) for tensor in activations] == [(1, tokens, width)]


def test_the_layer_before_is_on_its_way_while_a_layer_is_computed_again_and_no_other(tmp_path, monkeypatch):
    trainer = trainer_of(model_folder(tmp_path), "float32", **SCHEMES["offloaded"])
    wake_adapter(trainer)
    copies, arriving, backward = [], [], []
    send = HostMemory.send

    def remember(memory, tensor):
        copy = send(memory, tensor)
        copies.append(weakref.ref(copy))
        return copy

    def look(*_):
        if backward:
            arriving.append([i for i, copy in enumerate(copies) if copy() is not None and copy()._arriving is not None])

    monkeypatch.setattr(HostMemory, "send", remember)
    for layer in decoder_layers(trainer):
        layer.self_attn.register_forward_pre_hook(look)
    trainer.forward_backward([packed(sequences(LENGTHS))], Watching(lambda: backward.append(True)))
    assert len(copies) == LAYERS - 1
    assert arriving == [[2], [1], [0], []]
    assert all(copy() is None or not copy()._pieces for copy in copies)


def test_host_memory_is_reused_grows_with_the_micro_batch_and_is_let_go_of(tmp_path):
    trainer = trainer_of(model_folder(tmp_path), "float32", share_prompts=False, **SCHEMES["offloaded"])
    memory = host_memory(trainer)
    assert memory.nbytes == 0
    sizes = []
    for lengths in ([5, 5], [5, 5], [9, 14, 6], [5, 5]):
        trainer.forward_backward([packed(sequences(lengths))] * 2, algorithms.parse("grpo"))
        assert memory.waiting == 0
        sizes.append(memory.nbytes)
    small, large = (3 * tokens * 32 * 4 for tokens in (10, 29))  # all layers but the last, [T, 32] in float32
    assert sizes == [-(-small // 1000) * 1000] * 2 + [-(-large // 1000) * 1000] * 2
    gone = weakref.ref(memory)
    del memory
    trainer.close()
    assert gone() is None


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path, moment):
    folder = model_folder(tmp_path)
    batch = packed(sequences(LENGTHS))
    expected = gradients_of(folder, [batch])
    trainer = trainer_of(folder, "float32", **SCHEMES["offloaded"])
    wake_adapter(trainer)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == (1 if moment == "forward" else 2):
            raise RuntimeError("out of luck")

    hook = decoder_layers(trainer)[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.forward_backward([batch], algorithms.parse("grpo"))
    hook.remove()
    gc.collect()
    assert offload.OUTPUT_USED.get()
    assert host_memory(trainer).waiting == 0
    held = host_memory(trainer).nbytes
    trainer.reset_optimizer()
    wake_adapter(trainer)
    trainer.forward_backward([batch], algorithms.parse("grpo"))
    assert_bitwise(gradients(trainer), expected)
    assert host_memory(trainer).nbytes <= max(held, 4000 * 3)


def test_scoring_and_the_reference_keep_nothing_and_say_the_same(tmp_path):
    folder = model_folder(tmp_path)
    batch = packed(sequences(LENGTHS))
    plain, trainer = trainer_of(folder, "float32"), trainer_of(folder, "float32", **SCHEMES["offloaded"])
    for each in (plain, trainer):
        wake_adapter(each)
    for reference in (False, True):
        expected = plain.score([batch], reference=reference)[0].logprobs
        assert torch.equal(trainer.score([batch], reference=reference)[0].logprobs, expected)
    assert host_memory(trainer).nbytes == 0
    trainer.forward_backward([batch], algorithms.parse("grpo"))
    trainer.optim_step(step_params())
    moved = trainer.score([batch])[0].logprobs
    reference = trainer.score([batch], reference=True)[0].logprobs
    assert torch.equal(reference, plain.score([batch], reference=True)[0].logprobs)
    assert not torch.equal(moved, reference)


class Layer(GradientCheckpointingLayer):
    """Takes a second tensor with a gradient, and returns more than one thing."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden, other, scale=1.0, memo=None):
        if memo is not None:
            memo["seen"] = hidden
        return hidden + scale * torch.tanh(self.linear(hidden) * other), None, other * 2


class Stack(nn.Module):
    """Three layers, whose second tensor depends on a parameter."""

    def __init__(self, width=5, memo=None):
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Parameter(torch.randn(width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(3))
        self.memo = memo

    def forward(self, hidden):
        other = self.start.sin()
        for layer in self.layers:
            hidden, nothing, other = layer(hidden, other, scale=0.5, memo=self.memo)
            assert nothing is None
        return hidden


@pytest.mark.parametrize("offloaded", [False, True])
def test_layers_with_several_inputs_and_outputs(offloaded):
    x, found = torch.randn(7, 5), []
    for recomputed in (False, True):
        stack = Stack()
        if recomputed:
            checkpoint_layers(stack, torch.device("cpu"), offload=offloaded)
        stack(x).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in stack.named_parameters()})
    assert found[0]["start"].norm() > 0.1
    assert_bitwise(found[1], found[0])


def test_layers_that_hand_on_state_through_their_arguments_are_refused():
    """Its gradient would be lost without a word."""
    stack = Stack(memo={})
    checkpoint_layers(stack, torch.device("cpu"))
    with pytest.raises(EngineError, match=r"Layer hands state .*: set trainer\.activation_checkpointing = false"):
        stack(torch.randn(7, 5))
    with torch.no_grad():
        stack(torch.randn(7, 5))


def test_a_model_without_layers_is_refused():
    with pytest.raises(EngineError, match="Linear has no layers to recompute"):
        checkpoint_layers(nn.Linear(2, 2), torch.device("cpu"))


def test_a_second_backward_pass_over_what_is_gone_fails():
    stack = Stack()
    checkpoint_layers(stack, torch.device("cpu"), offload=True)
    loss = stack(torch.randn(7, 5)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="no second backward pass"):
        loss.backward()


class Block(GradientCheckpointingLayer):
    """Deterministic on a GPU, and long enough for copies to lag behind."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden):
        return hidden + self.down(torch.relu(self.up(hidden)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("failing", [False, True])
def test_on_a_gpu_gradients_are_bitwise_the_same_and_the_inputs_are_gone(monkeypatch, failing):
    monkeypatch.setattr(offload, "SEGMENT", 2**24)
    tokens, width, depth = 8192, 1024, 12
    torch.manual_seed(0)
    inputs = [torch.randn(count, width, device="cuda", dtype=torch.bfloat16) for count in (tokens, 3000, tokens)]
    found, held = [], []
    for scheme in ("plain", "kept", "offloaded"):
        torch.manual_seed(1)
        stack = nn.Sequential(*(Block(width) for _ in range(depth))).to("cuda", torch.bfloat16)
        memory = None
        if scheme != "plain":
            memory = checkpoint_layers(stack, torch.device("cuda", 0), offload=scheme == "offloaded")
        if failing:
            hook = stack[5].down.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stack(inputs[0])
            hook.remove()
        for x in inputs:
            before = torch.cuda.memory_allocated()
            loss = stack(x).float().square().mean()
            held.append((torch.cuda.memory_allocated() - before) / (x.numel() * 2))
            loss.backward()
            del loss
        found.append([parameter.grad.clone() for parameter in stack.parameters()])
        if memory is not None:
            assert memory.waiting == 0
            assert memory.nbytes == -(-(depth - 1) * tokens * width * 2 // 2**24) * 2**24
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    plain, kept, offloaded = held[0], held[3], held[6]
    assert plain > 3 * depth  # the relu's output, and what is behind the sum
    # layer inputs (the first is the caller's), the output in float32 twice
    assert kept < depth + 5
    assert offloaded < 6
