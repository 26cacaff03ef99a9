"""The chunked log-probabilities against a dense float64 softmax and its autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.kernels.reference import logprobs, token_logprobs

HEADS = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"scale": 0.3},
    {"softcap": 2.0, "scale": 1.7, "temperature": 1.3},
]


def dense(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, scale=None):
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(1, targets.unsqueeze(1)).squeeze(1), -(logprobs.exp() * logprobs).sum(1)


def problem(rows=5, width=4, vocabulary=50, trainable=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    hidden = draw(rows, width).requires_grad_()
    weight = (2 * draw(vocabulary, width)).requires_grad_(trainable)
    bias = draw(vocabulary).requires_grad_(trainable)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, weight, bias, targets, draw(rows), draw(rows)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "chunk"), [(5, 50, 7), (1, 50, 50), (5, 1, 4), (3, 2, 1), (5, 41, 4096)]
)
def test_values_and_gradients_equal_dense_autograd(head, trainable, rows, vocabulary, chunk):
    hidden, weight, bias, targets, for_logprobs, for_entropy = problem(rows, 4, vocabulary, trainable)
    leaves = [hidden, weight, bias] if trainable else [hidden]
    ours = token_logprobs(hidden, weight, targets, bias=bias, entropy_gradient=True, chunk=chunk, **head)
    theirs = dense(hidden, weight, targets, bias, **head)
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
    one = torch.autograd.grad((ours[0] * for_logprobs + ours[1] * for_entropy).sum(), leaves)
    two = torch.autograd.grad((theirs[0] * for_logprobs + theirs[1] * for_entropy).sum(), leaves)
    for ours_grad, theirs_grad in zip(one, two):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_gradcheck(trainable):
    hidden, weight, bias, targets, *_ = problem(3, 3, 7, trainable)
    run = lambda *leaves: token_logprobs(leaves[0], weight, targets, bias=bias, entropy_gradient=True, chunk=3)  # noqa: E731
    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def test_blocks_of_rows_are_worked_on_apart(monkeypatch):
    hidden, weight, bias, targets, for_logprobs, _ = problem(rows=10, trainable=True)
    leaves = [hidden, weight, bias]
    whole = token_logprobs(hidden, weight, targets, bias=bias)[0]
    expected = torch.autograd.grad((whole * for_logprobs).sum(), leaves)
    monkeypatch.setattr(logprobs, "BLOCK_ROWS", 3)
    parts = token_logprobs(hidden, weight, targets, bias=bias)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)
    for one, two in zip(torch.autograd.grad((parts * for_logprobs).sum(), leaves), expected):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [5.0, 15.0, 20.0, 30.0, 60.0])
def test_digits_survive_a_large_margin(dtype, margin):
    # Two symbols whose logits differ by the margin: logp = −log1p(e^−margin), and its gradient is e^−margin / (1 + …).
    weight = torch.tensor([[1.0], [0.0]], dtype=dtype)
    hidden = torch.tensor([[margin]], dtype=dtype, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0]), entropy_gradient=True)
    rest = math.exp(-margin) / (1 + math.exp(-margin))
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    assert logprobs.item() == pytest.approx(-math.log1p(math.exp(-margin)), rel=tolerance)
    assert entropy.item() == pytest.approx(math.log1p(math.exp(-margin)) + rest * margin, rel=tolerance)
    assert torch.autograd.grad(logprobs.sum(), hidden)[0].item() == pytest.approx(rest, rel=tolerance)


@pytest.mark.parametrize("margin", [20.0, 60.0])
def test_digits_survive_a_large_margin_with_a_trainable_head(margin):
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    hidden = torch.tensor([[margin]], requires_grad=True)
    token_logprobs(hidden, weight, torch.tensor([0]), chunk=1)[0].sum().backward()
    rest = math.exp(-margin) / (1 + math.exp(-margin))
    assert hidden.grad.item() == pytest.approx(rest, rel=1e-5)
    assert weight.grad.flatten().tolist() == pytest.approx([margin * rest, -margin * rest], rel=1e-5)


def test_an_impossible_target_keeps_its_distance():
    # The target lies 200 below the rest: exp underflows, the log-probability does not.
    weight = torch.tensor([[0.0], [1.0], [1.0]])
    hidden = torch.tensor([[200.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0]))
    assert logprobs.item() == pytest.approx(-200 - math.log(2), rel=1e-6)
    assert entropy.item() == pytest.approx(math.log(2), rel=1e-6)
    assert torch.autograd.grad(logprobs.sum(), hidden)[0].item() == pytest.approx(-1.0, rel=1e-6)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_values_are_the_same_bits_with_and_without_gradients(trainable):
    hidden, weight, bias, targets, *_ = problem(trainable=trainable)
    hidden, weight = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_(trainable)
    plain = token_logprobs(hidden, weight, targets, bias=bias, entropy_gradient=False, chunk=7)
    both = token_logprobs(hidden, weight, targets, bias=bias, entropy_gradient=True, chunk=7)
    with torch.no_grad():
        scored = token_logprobs(hidden, weight, targets, bias=bias, chunk=7)
    for index in (0, 1):
        assert torch.equal(plain[index], both[index]) and torch.equal(plain[index], scored[index])
    assert plain[0].requires_grad and not plain[1].requires_grad and both[1].requires_grad
    assert not scored[0].requires_grad


def test_no_tokens():
    hidden = torch.zeros(0, 4, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, torch.ones(9, 4), torch.zeros(0, dtype=torch.int64))
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()


def test_half_precision_states_are_summed_in_float32():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(5000, 64, generator=generator).bfloat16()
    targets = torch.randint(5000, (6,), generator=generator)
    logprobs, entropy = token_logprobs(hidden, weight, targets, chunk=512)
    exact = hidden.detach().double().requires_grad_()
    expected, expected_entropy = dense(exact, weight.double(), targets)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-4, atol=1e-4)
    logprobs.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=2**-7, atol=1e-2)


class LargestOutput(TorchDispatchMode):
    """Remembers the largest tensor any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_no_tensor_of_tokens_by_vocabulary_is_made(trainable):
    rows, width, vocabulary, chunk = 60, 4, 1000, 100
    hidden, weight, _, targets, *_ = problem(rows, width, vocabulary, trainable)
    with LargestOutput() as seen:
        logprobs, entropy = token_logprobs(hidden, weight, targets, entropy_gradient=True, chunk=chunk)
        (logprobs + entropy).sum().backward()
    assert seen.elements == rows * chunk
    with LargestOutput() as seen:
        dense(hidden, weight, targets)[0].sum().backward()
    assert seen.elements == rows * vocabulary
