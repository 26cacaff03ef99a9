"""Rotary embedding, alone and after a norm of each head, against float64: on a GPU as compiled, without one under
Triton's interpreter (in a child process); and compiled for GPUs that are not there.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from posttrain.kernels import reference
from tests.kernels.against_float64 import assert_error_is_at_most_twice_torchs, drawn
from tests.kernels.kernel_tests import CAPABILITIES, DEVICE, INTERPRETED, TYPES, compiled, run_interpreted, runs
from tests.kernels.kernel_tests import filled_with_nan as filled_with_nan

pytest.importorskip("triton")
from posttrain.kernels import rope as module
from posttrain.kernels import rope_kernels
from posttrain.kernels.rope import norm_rope, rope, rope_

EPS = 1e-6
SHAPES = [(1, 1, 1, 2, 2), (5, 4, 2, 16, 16), (3, 9, 3, 41, 24), (2, 3, 1, 80, 80), (0, 4, 2, 16, 16)]
"""Tokens, query heads, key heads, head dim, rotated dims."""
if DEVICE == "cuda":
    SHAPES += [(341, 32, 8, 128, 128), (341, 24, 8, 128, 96), (341, 4, 1, 256, 256), (1024, 128, 8, 128, 128)]


def test_under_the_interpreter():
    run_interpreted(__file__, at_least=70)


def angles(tokens, rotated, interleaved, dtype):
    """cos and sin of positions that start over, as packed sequences' do; in a type of their own, in wider rows."""
    positions = torch.arange(tokens) % 3 * 777.0
    turns = positions[:, None] * 10000.0 ** (-torch.arange(0, rotated, 2) / rotated)
    table = turns.repeat_interleave(2, 1) if interleaved else torch.cat((turns, turns), 1)
    wider = torch.cat((table, table), 1).to(DEVICE)
    return wider.cos().to(dtype)[:, :rotated], wider.sin().to(dtype)[:, :rotated]


def problem(shape, dtype, interleaved):
    """q and k cut out of one product, strides between tokens, heads and columns not what they would be alone."""
    tokens, heads, key_heads, width, rotated = shape
    fused = drawn(tokens, heads + 2 * key_heads, width, dtype=dtype)
    q, k = fused[:, :heads], fused[:, heads : heads + key_heads]
    return [q, k], angles(tokens, rotated, interleaved, dtype)


def plain(q, k, cos, sin, interleaved):
    """As transformers does it, in the type of q."""
    rotated = cos.shape[1]
    cos, sin = cos.to(q.dtype).unsqueeze(1), sin.to(q.dtype).unsqueeze(1)

    def turned(x):
        x, rest = x[..., :rotated], x[..., rotated:]
        if interleaved:
            quarter = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        else:
            quarter = torch.cat((-x[..., rotated // 2 :], x[..., : rotated // 2]), -1)
        return torch.cat((x * cos + quarter * sin, rest), -1)

    return turned(q), turned(k)


def plain_norm(q, k, q_weight, k_weight, cos, sin, interleaved, offset):
    def normed(x, weight):
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        if offset:
            return (wide * (offset + weight.to(wide.dtype))).to(x.dtype)
        return weight.to(x.dtype) * wide.to(x.dtype)

    return plain(normed(q, q_weight), normed(k, k_weight), cos, sin, interleaved)


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_error_is_at_most_twice_torchs(shape, dtype, interleaved, filled_with_nan):
    inputs, (cos, sin) = problem(shape, dtype, interleaved)
    for function in (rope, reference.rope):
        theirs = partial(plain, cos=cos, sin=sin, interleaved=interleaved)
        assert_error_is_at_most_twice_torchs(
            partial(function, cos=cos, sin=sin, interleaved=interleaved), theirs, inputs
        )


@runs
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_error_after_a_norm_is_at_most_twice_torchs(shape, dtype, interleaved, offset, filled_with_nan):
    inputs, (cos, sin) = problem(shape, dtype, interleaved)
    inputs += [drawn(shape[3], dtype=dtype, seed=seed) for seed in (1, 2)]
    settings = {"cos": cos, "sin": sin, "interleaved": interleaved, "offset": offset}
    for function in (norm_rope, reference.norm_rope):
        ours = partial(function, eps=EPS, **settings)
        assert_error_is_at_most_twice_torchs(ours, partial(plain_norm, **settings), inputs)


@runs
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_pair_is_a_complex_number_times_a_unit(interleaved, filled_with_nan):
    """Written out for one head: another derivation than rotate-half's."""
    x = drawn(3, 1, 8, seed=4)
    cos, sin = angles(3, 6, interleaved, torch.float32)
    turned, _ = rope(x, x, cos, sin, interleaved=interleaved)
    columns = ([0, 2, 4], [1, 3, 5]) if interleaved else ([0, 1, 2], [3, 4, 5])
    unit = torch.complex(cos[:, columns[0]].double(), sin[:, columns[0]].double())
    expected = torch.complex(x[:, 0, columns[0]].double(), x[:, 0, columns[1]].double()) * unit
    torch.testing.assert_close(turned[:, 0, columns[0]].double(), expected.real, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(turned[:, 0, columns[1]].double(), expected.imag, rtol=1e-6, atol=1e-6)
    assert torch.equal(turned[..., 6:], x[..., 6:])


@runs
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_in_place_it_is_the_same_and_touches_nothing_else(shape, interleaved, filled_with_nan):
    (q, k), (cos, sin) = problem(shape, torch.float32, interleaved)
    expected = rope(q, k, cos, sin, interleaved=interleaved)
    whole = q._base.clone()  # of q, k, v and the columns around them
    q_, k_ = (whole.as_strided(x.shape, x.stride(), x.storage_offset()) for x in (q, k))
    found = rope_(q_, k_, cos, sin, interleaved=interleaved)
    assert found[0] is q_
    for turned, wanted in zip((q_, k_), expected):  # two variants of a kernel may contract products differently
        torch.testing.assert_close(turned, wanted, rtol=1e-6, atol=1e-6)
    rope_(q_, k_, cos, sin, interleaved=interleaved, inverse=True)
    torch.testing.assert_close(whole, q._base, rtol=1e-5, atol=1e-5)
    q_.zero_(), k_.zero_()
    untouched = q._base.clone()
    for x in (q, k):
        untouched.as_strided(x.shape, x.stride(), x.storage_offset()).zero_()
    assert torch.equal(whole, untouched)


@runs
@pytest.mark.parametrize("interleaved", [False, True])
def test_many_heads_go_by_blocks_and_many_tokens_by_turns(interleaved, monkeypatch, filled_with_nan):
    monkeypatch.setattr(module, "FORWARD", module.FORWARD._replace(elements=32))
    monkeypatch.setattr(module, "NORM_BACKWARD", module.NORM_BACKWARD._replace(elements=32))
    monkeypatch.setattr(module, "PROGRAMS", 1)
    inputs, (cos, sin) = problem((11, 5, 3, 20, 12), torch.float32, interleaved)
    inputs += [drawn(20, seed=seed) for seed in (1, 2)]
    settings = {"cos": cos, "sin": sin, "interleaved": interleaved, "offset": 0.0}
    assert_error_is_at_most_twice_torchs(
        partial(norm_rope, eps=EPS, **settings), partial(plain_norm, **settings), inputs
    )


@runs
@pytest.mark.parametrize("wanted", ["neither", "q_weight", "k_weight"])
def test_only_a_weight_that_requires_one_gets_a_gradient(wanted, filled_with_nan):
    inputs, (cos, sin) = problem((4, 2, 1, 16, 16), torch.float32, False)
    inputs += [drawn(16, seed=seed) for seed in (1, 2)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(sum(y.square().sum() for y in plain_norm(*leaves, cos, sin, False, 0.0)), leaves)
    leaves = [x.detach().requires_grad_() for x in inputs[:2]]
    leaves += [
        x.detach().requires_grad_(name == wanted) for name, x in zip(("q_weight", "k_weight"), inputs[2:], strict=True)
    ]
    sum(y.square().sum() for y in norm_rope(*leaves, EPS, cos, sin)).backward()
    for index, (leaf, right) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is None) == (not leaf.requires_grad), index
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, right, rtol=1e-4, atol=1e-5)


@runs
def test_only_q_may_be_used(filled_with_nan):
    (q, k), (cos, sin) = problem((3, 2, 1, 16, 16), torch.float32, False)
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    rope(q, k, cos, sin)[0].square().sum().backward()
    torch.testing.assert_close(q.grad, 2 * q.detach(), rtol=1e-5, atol=1e-5)  # a rotation keeps lengths
    assert not k.grad.any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
def test_tokens_beyond_2_to_the_31_elements_are_found():
    wide = torch.zeros(65600, 32800, dtype=torch.float16, device=DEVICE)[:, :48].unflatten(1, (3, 16))
    wide[-1] = drawn(3, 16, dtype=torch.float16)
    cos, sin = angles(65600, 16, False, torch.float32)
    q, k = rope(wide[:, :2], wide[:, 2:], cos, sin)
    expected = reference.rope(wide[-1:, :2], wide[-1:, 2:], cos[-1:], sin[-1:])
    torch.testing.assert_close((q[-1:], k[-1:]), expected)
    assert not q[:-1].any() and not k[:-1].any()


def test_shapes_that_do_not_fit_are_refused():
    q, k, table = torch.ones(3, 2, 8), torch.ones(3, 1, 8), torch.ones(3, 8)
    for arguments in ((q, k[:, :, :6], table), (q, k, table[:2]), (q, k, torch.ones(3, 10)), (q, k, table[:, :3])):
        with pytest.raises(AssertionError, match=r"cos|q \("):
            rope(*arguments, arguments[2])
    with pytest.raises(AssertionError, match="contiguous"):
        rope_(q.transpose(1, 2), k, table, table)


def kernel_for(name, shape, capability, element, **changes):
    heads, key_heads, width, rotated = shape
    forward = name == "forward"
    kernel = rope_kernels.rope_fwd_kernel if forward else rope_kernels.norm_rope_bwd_kernel
    q, k, cos = torch.empty(1, heads, width), torch.empty(1, key_heads, width), torch.empty(1, rotated)
    sizes, warps = module._blocks(q, k, cos, module.FORWARD if forward else module.NORM_BACKWARD)
    pointers = {name: element for name in kernel.arg_names if name.endswith("_ptr")}
    pointers |= {} if forward else {"sums_ptr": "fp32"}
    constants = sizes | ({"NORM": False, "INVERSE": False} if forward else {"WEIGHT_GRADIENT": False})
    constants |= {"INTERLEAVED": False} | changes
    strides = tuple(name for name in kernel.arg_names if name.startswith("stride"))
    return compiled(kernel, capability, pointers, constants, floats=("eps", "offset"), aligned=strides, warps=warps)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_they_compile_for_gpus_that_are_not_here(capability, name):
    element = "fp16" if capability < 80 else "bf16"
    for interleaved in (False, True):
        ptx = kernel_for(name, (32, 8, 128, 128), capability, element, INTERLEAVED=interleaved).asm["ptx"]
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx and "st.global.b16" not in ptx, (
            "16 bytes at once"
        )


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("shape", [(128, 8, 128, 128), (24, 8, 128, 96), (4, 1, 256, 256)], ids=str)
def test_many_heads_partial_rotation_and_wide_heads_compile(shape):
    for name in ("forward", "backward"):
        ptx = kernel_for(name, shape, 90, "bf16").asm["ptx"]
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("element", ["fp16", "fp32"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_variant_compiles(element, interleaved):
    shape = (32, 8, 64, 48)
    for norm in (False, True):
        kernel_for("forward", shape, 90, element, NORM=norm, INVERSE=True, INTERLEAVED=interleaved)
    kernel_for("backward", shape, 90, element, WEIGHT_GRADIENT=True, INTERLEAVED=interleaved)
