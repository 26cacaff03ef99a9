"""Log-probabilities without logits against float64 autograd of a plain log_softmax."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from .kernel_tests import CAPABILITIES, DEVICE, INTERPRETED, TYPES, compiled, distance, run_interpreted, runs
from .kernel_tests import filled_with_nan as filled_with_nan

pytest.importorskip("triton")
from posttrain.kernels import token_logprobs as module
from posttrain.kernels import vocabulary_tiles
from posttrain.kernels.token_logprobs import token_logprobs

HEADS = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0, "temperature": 1.3},
    {"scale": 0.3, "bias": True},
    {"softcap": 2.0, "scale": 1.7, "temperature": 0.6, "bias": True},
]
SHAPES = [(5, 41, 9, 16), (9, 9, 50, 8), (1, 341, 70, 4096), (3, 8, 2, 1), (4, 8, 1, 4)]
"""Rows, width, vocabulary, columns of a tile."""
if DEVICE == "cuda":
    SHAPES += [(341, 512, 5003, 1024), (9000, 64, 3000, 2048), (70, 2560, 20000, 8192)]


def test_under_the_interpreter():
    run_interpreted(__file__, at_least=2 * len(HEADS) + 2 * len(SHAPES))


def problem(shape, dtype=torch.float32, bias=False, seed=0, spread=2.0):
    """Hidden, weight, bias, targets and the gradients of logprobs and entropy; logits of standard deviation 2."""
    rows, width, vocabulary, _ = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    hidden, weight = draw(rows, width).to(dtype), (spread * draw(vocabulary, width) / width**0.5).to(dtype)
    shifts = draw(vocabulary).to(dtype) if bias else None
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    moved = [None if each is None else each.to(DEVICE) for each in (hidden, weight, shifts, targets)]
    return *moved, draw(rows).to(DEVICE), draw(rows).to(DEVICE)


def dense(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, scale=None):
    """In the type of the arguments up to the logits, then float32 at least."""
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        logits = logits + bias
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    table = torch.log_softmax(logits / temperature, -1)
    return table.gather(1, targets.unsqueeze(1)).squeeze(1), -(table.exp() * table).sum(1)


def wide(*tensors):
    return [None if tensor is None else tensor.detach().double() for tensor in tensors]


def gradients(function, leaves, for_logprobs, for_entropy, **options):
    leaves = [leaf if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    logprobs, entropy = function(*leaves, **options)
    loss = (logprobs * for_logprobs).sum()
    if entropy.requires_grad and for_entropy is not None:
        loss = loss + (entropy * for_entropy).sum()
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])


def check(shape, dtype, head, trainable, with_entropy=True):
    """Values and gradients are at most twice as far from float64 as torch's dense ones of the same type."""
    head = dict(head)
    hidden, weight, bias, targets, for_logprobs, for_entropy = problem(shape, dtype, head.pop("bias", False))
    for_entropy = for_entropy if with_entropy else None
    exact = dense(*wide(hidden, weight), targets, *wide(bias), **head)
    theirs = dense(hidden.float(), weight.float(), targets, bias, **head)
    ours = token_logprobs(hidden, weight, targets, bias=bias, chunk=shape[3], **head)
    floor = 2e-6 * max(1.0, exact[0].abs().max().item())
    for one, two, three in zip(ours, theirs, exact):
        assert one.dtype == torch.float32 and one.shape == (shape[0],)
        assert distance(one, three) <= 2 * distance(two, three) + floor

    fixed = () if trainable else (weight, bias)

    def run(function, kept):
        def call(h, w=kept[0] if kept else None, b=kept[1] if kept else None):
            return function(h, w, b)

        return call

    def ours_of(h, w, b):
        return token_logprobs(h, w, targets, bias=b, entropy_gradient=with_entropy, chunk=shape[3], **head)

    def dense_of(h, w, b):
        return dense(h, w, targets, b, **head)

    leaves = (hidden, weight, bias) if trainable else (hidden,)
    found = gradients(run(ours_of, fixed), leaves, for_logprobs, for_entropy)
    torchs = gradients(run(dense_of, fixed), leaves, for_logprobs, for_entropy)
    truth = gradients(run(dense_of, wide(*fixed)), wide(*leaves), *wide(for_logprobs, for_entropy))
    for one, two, three in zip(found, torchs, truth):
        assert one.dtype == dtype and one.shape == three.shape
        rounding = max(torch.finfo(dtype).eps, 1e-6) * three.abs().max().item()  # a dozen roundings in float32
        assert distance(one, three) <= 2 * distance(two, three) + rounding, (distance(one, three), distance(two, three))


@runs
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_every_option(head, trainable, filled_with_nan):
    check((5, 41, 50, 16), torch.float32, head, trainable)


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_error_is_at_most_twice_torchs(shape, dtype, trainable, filled_with_nan):
    check(shape, dtype, {}, trainable)


@runs
def test_without_a_gradient_of_the_entropy(filled_with_nan):
    check((5, 41, 50, 16), torch.float32, {}, False, with_entropy=False)
    check((5, 41, 50, 16), torch.float32, {}, True, with_entropy=False)


@pytest.fixture
def sixteen_bits(monkeypatch):
    """The products of a GPU on the host: operands of 16 bits, sums in float32."""

    def product(a, b, out, add=False):
        result = a.float() @ b.float()
        out.copy_(out + result if add else result)

    if DEVICE == "cpu":
        monkeypatch.setattr(module, "product", product)
        monkeypatch.setattr(module, "_operand_dtype", lambda hidden, weight: hidden.dtype)


@runs
@pytest.mark.parametrize("head", [HEADS[0], HEADS[4], {"temperature": 0.01}], ids=str)
@pytest.mark.parametrize("shape", [(5, 41, 50, 16), (3, 64, 341, 64)], ids=str)
def test_factors_of_16_bits_lie_over_the_logits(head, shape, sixteen_bits, filled_with_nan):
    check(shape, torch.float16, head, False)
    check(shape, torch.float16, head, False, with_entropy=False)
    check(shape, torch.float16, head, True)


@runs
def test_what_all_rows_of_the_weight_share_cancels_in_the_entropy(sixteen_bits):
    # A nearly flat distribution over rows with a large part in common: Σ p (log p + entropy) w has it with weight 0.
    rows, width, vocabulary, chunk = 4, 64, 2000, 256
    hidden, weight, _, targets, *_ = problem((rows, width, vocabulary, chunk), torch.float16, spread=0.5)
    shared = torch.linspace(-1, 1, width, device=DEVICE)
    shared -= hidden.float().T @ torch.linalg.lstsq(hidden.float().T, shared[:, None])[0].squeeze(1)  # no logits of it
    weight = (weight + 10 * shared).half()
    ones = torch.ones(rows, device=DEVICE)

    def of_the_entropy(function, h):
        return gradients(lambda leaf: function(leaf), [h], 0 * ones.to(h.dtype), ones.to(h.dtype))[0]

    ours = of_the_entropy(lambda h: token_logprobs(h, weight, targets, entropy_gradient=True, chunk=chunk), hidden)
    truth = of_the_entropy(lambda h: dense(h, weight.double(), targets), hidden.double())
    assert distance(ours, truth) <= 5e-3 * truth.abs().max().item()


@runs
@pytest.mark.parametrize("order", ["rising", "falling", "steps"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_maxima_that_grow_by_hundreds_from_tile_to_tile(order, half, sixteen_bits, filled_with_nan):
    # One feature sets the logits: 0, 200, 400, … in tiles of 2; the second tells the symbols of a tile apart.
    heights = {"rising": [0, 1, 2, 3, 4], "falling": [4, 3, 2, 1, 0], "steps": [0, 0.002, 1, 1.004, 0.5]}[order]
    weight = torch.tensor([[height, part] for height in heights for part in (0.0, 0.5)], device=DEVICE)
    hidden = torch.tensor([[200.0, 1.0], [-200.0, 2.0], [0.0, 3.0], [100.0, -1.0]], device=DEVICE)
    dtype = torch.float16 if half else torch.float32
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    for_logprobs, for_entropy = torch.tensor([1.0, -2.0, 0.5, 3.0], device=DEVICE), torch.ones(4, device=DEVICE)
    for target in range(10):
        targets = torch.full((4,), target, device=DEVICE)
        ours = lambda h: token_logprobs(h, weight, targets, entropy_gradient=True, chunk=2)  # noqa: E731, B023
        theirs = lambda h: dense(h, weight.double(), targets)  # noqa: E731, B023
        for one, two in zip(ours(hidden), theirs(hidden.double())):
            torch.testing.assert_close(one.double(), two, rtol=1e-6, atol=2e-5)  # a rounding of 200
        found = gradients(ours, [hidden], for_logprobs, for_entropy)[0]
        truth = gradients(theirs, wide(hidden), *wide(for_logprobs, for_entropy))[0]
        scale = weight.abs().max().item() * 3
        assert distance(found, truth) <= (2e-3 if half else 1e-5) * scale


@runs
@pytest.mark.parametrize("margin", [5.0, 15.0, 20.0, 30.0, 60.0])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_digits_survive_a_large_margin(margin, trainable, chunk):
    # Two symbols whose logits differ by the margin: logp = −log1p(e^−margin), and its gradient is e^−margin / (1 + …).
    weight = torch.tensor([[1.0], [0.0]], device=DEVICE, requires_grad=trainable)
    hidden = torch.tensor([[margin]], device=DEVICE, requires_grad=True)
    targets = torch.tensor([0], device=DEVICE)
    logprobs, entropy = token_logprobs(hidden, weight, targets, entropy_gradient=True, chunk=chunk)
    rest = math.exp(-margin) / (1 + math.exp(-margin))
    assert logprobs.item() == pytest.approx(-math.log1p(math.exp(-margin)), rel=1e-5)
    assert entropy.item() == pytest.approx(math.log1p(math.exp(-margin)) + rest * margin, rel=1e-5)
    logprobs.sum().backward(retain_graph=True)
    assert hidden.grad.item() == pytest.approx(rest, rel=1e-5)
    if trainable:
        assert weight.grad.flatten().tolist() == pytest.approx([margin * rest, -margin * rest], rel=2e-5)


@runs
def test_an_impossible_target_keeps_its_distance():
    weight = torch.tensor([[0.0], [1.0], [1.0]], device=DEVICE)
    hidden = torch.tensor([[200.0]], device=DEVICE, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0], device=DEVICE), chunk=2)
    assert logprobs.item() == pytest.approx(-200 - math.log(2), rel=1e-6)
    assert entropy.item() == pytest.approx(math.log(2), rel=1e-6)
    assert torch.autograd.grad(logprobs.sum(), hidden)[0].item() == pytest.approx(-1.0, rel=1e-6)


@runs
def test_symbols_that_a_bias_rules_out():
    hidden, weight, bias, targets, *_ = problem((4, 8, 20, 4), bias=True)
    bias[4:12] = -math.inf  # two whole tiles
    targets = targets % 4
    for_logprobs = torch.ones(4, device=DEVICE)
    ours = lambda h: token_logprobs(h, weight, targets, bias=bias, chunk=4, entropy_gradient=True)  # noqa: E731
    kept = [*range(4), *range(12, 20)]
    theirs = lambda h: dense(h, weight.double()[kept], targets, bias.double()[kept])  # noqa: E731
    for one, two in zip(ours(hidden), theirs(hidden.double())):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)
    found = gradients(ours, [hidden], for_logprobs, for_logprobs)[0]
    truth = gradients(theirs, wide(hidden), *wide(for_logprobs, for_logprobs))[0]
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_are_the_same_bits_with_and_without_gradients(dtype, monkeypatch):
    shape = (341, 256, 5003, 1024) if DEVICE == "cuda" else (5, 9, 50, 16)
    monkeypatch.setattr(module, "ROWS", 128 if DEVICE == "cuda" else 2)
    hidden, weight, _, targets, *_ = problem(shape, dtype)
    found = [token_logprobs(hidden, weight, targets, chunk=shape[3])]
    for trainable, entropy_gradient in [(False, False), (False, True), (True, False), (True, True)]:
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
        found.append(token_logprobs(leaf, head, targets, entropy_gradient=entropy_gradient, chunk=shape[3]))
        assert found[-1][0].requires_grad and found[-1][1].requires_grad == entropy_gradient
    assert not found[0][0].requires_grad
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])


@runs
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_blocks_of_rows_are_worked_on_apart(trainable, monkeypatch, filled_with_nan):
    monkeypatch.setattr(module, "ROWS", 2)
    check((5, 9, 50, 16), torch.float32, {}, trainable)


@runs
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_no_tokens(trainable):
    hidden = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    weight = torch.ones(9, 4, device=DEVICE, requires_grad=trainable)
    targets = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad.shape == (0, 4) and (not trainable or not weight.grad.any())


@runs
def test_strided_arguments_and_float64():
    hidden, weight, bias, targets, *_ = problem((5, 8, 20, 8), bias=True)
    expected = token_logprobs(hidden, weight, targets, bias=bias, chunk=8)
    apart = lambda tensor: torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]  # noqa: E731
    found = token_logprobs(hidden.T.contiguous().T, apart(weight), apart(targets), bias=apart(bias), chunk=8)
    for one, two in zip(found, expected):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    wider = token_logprobs(*wide(hidden, weight), targets, bias=bias.double(), temperature=0.7)
    for one, two in zip(wider, dense(*wide(hidden, weight), targets, bias.double(), temperature=0.7)):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@runs
def test_a_second_backward_through_a_frozen_head_is_refused():
    hidden, weight, _, targets, *_ = problem((2, 4, 6, 4))
    logprobs, _ = token_logprobs(hidden.requires_grad_(), weight, targets, chunk=4)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_memory_does_not_grow_with_the_vocabulary():
    rows, width, vocabulary = 8192, 1024, 100_000
    hidden = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=torch.bfloat16) / width**0.5
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    token_logprobs(hidden, weight, targets)[0].sum().backward()  # cuBLAS gets its workspace
    hidden.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_logprobs(hidden, weight, targets)[0].sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    tile, sums = 4 * module.ROWS * module.CHUNK, 4 * module.ROWS * width
    assert extra <= 2 * rows * width + tile + sums + 2**22, "∂logp/∂h, one tile, its sums, statistics"


POINTERS = {"z_ptr": "fp32", "targets_ptr": "i64", "stats_ptr": "fp32"}
SIZES = ("stride_zn", "start", "columns")


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("softcap", [False, True])
def test_it_compiles_for_gpus_that_are_not_here(capability, softcap):
    element = "fp16" if capability < 80 else "bf16"
    block = vocabulary_tiles.power_of_2(module.CHUNK)
    warps = vocabulary_tiles._warps(block)
    constants = {"HAS_BIAS": softcap, "HAS_SOFTCAP": softcap, "BLOCK_C": block}
    pointers = POINTERS | {"bias_ptr": element}
    forward = compiled(
        vocabulary_tiles._tile_fwd_kernel,
        capability,
        pointers | {"e_ptr": element, "f_ptr": element, "a_ptr": "fp32", "b_ptr": "fp32"},
        constants | {"BLOCK_H": 1024},
        floats=("inner", "outer"),
        aligned=(*SIZES, "stride_en"),
        warps=warps,
    )
    backward = compiled(
        vocabulary_tiles._tile_bwd_kernel,
        capability,
        pointers | {"g_ptr": element},
        constants,
        floats=("inner", "outer", "scale"),
        aligned=(*SIZES, "stride_gn"),
        warps=warps,
    )
    for binary in (forward, backward):
        ptx = binary.asm["ptx"]
        loads = ptx.count("ld.global.v4.b32")
        assert loads >= block // (32 * warps) // 4, "16 bytes a thread"


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("two", [False, True])
def test_directions_compile(capability, two):
    element = "fp16" if capability < 80 else "bf16"
    pointers = {"w_ptr": element, "targets_ptr": "i64", "c_ptr": "fp32", "a_ptr": "fp32", "b_ptr": "fp32"}
    pointers |= {"u_ptr": element, "v_ptr": element}
    constants = {"stride_wh": 1, "TWO": two, "BLOCK_H": 1024}
    aligned = ("H", "stride_wv", "stride_an", "stride_un")
    compiled(vocabulary_tiles._directions_kernel, capability, pointers, constants, aligned=aligned)
