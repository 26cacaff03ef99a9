"""The attention kernels against a float64 softmax under one mask over all tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from posttrain.kernels.reference.attention import Segments

from .kernel_tests import (
    CAPABILITIES,
    DEVICE,
    INTERPRETED,
    TYPES,
    compiled,
    distance,
    filled_with_nan,
    run_interpreted,
    runs,
)

pytest.importorskip("triton")
from posttrain.kernels import attention as ours
from posttrain.kernels.attention_blocks import key_blocks, query_blocks

__all__ = ["filled_with_nan"]

PACKS = {
    "one": ([41], None),
    "apart": ([17, 1, 33, 9], None),
    "group": ([35, 9, 1, 18, 16], [0, 0, 0, 0, 0]),
    "mixed": ([9, 21, 16, 3, 1, 1, 2, 19, 7], [0, 1, 1, 1, 4, 5, 5, 7, 7]),
}
"""Lengths, and for each segment the index of the one with its prompt; "mixed" has whole sequences between groups and a
prompt of one token."""
RULES = [{}, {"window": 13}, {"softcap": 2.0}, {"window": 20, "softcap": 1.5}]
HEADS = [(2, 2, 16), (4, 2, 24), (3, 1, 41)]
"""Query heads, key heads, head dim."""
SCALE = 0.2
SMALL = ours.Kernels(ours.Tiles(32, 16, 4, 2), ours.Tiles(16, 16, 4, 2), ours.Tiles(32, 16, 4, 2))


def test_under_the_interpreter():
    run_interpreted(__file__, at_least=len(CASES) + 5)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(ours, "TILES", dict.fromkeys(ours.TILES, SMALL))


def sees(lengths, prompts, window=None):
    """bool [T, T]."""
    prompts = torch.tensor(range(len(lengths)) if prompts is None else prompts)
    sizes = torch.tensor(lengths)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    place = torch.cat([torch.arange(length) for length in lengths])
    before = torch.where(prompts == torch.arange(len(lengths)), 0, sizes[prompts])
    position = place + before[segment]
    ahead = position[:, None] - position
    mine = segment[:, None] == segment
    return ((prompts[segment][:, None] == segment) | mine) & (ahead >= 0) & (ahead < (window or math.inf))


def exact(q, k, v, mask, softcap=None, dtype=torch.float64):
    """With the scores written out, head by head."""
    groups = q.shape[1] // k.shape[1]
    outs = []
    for head in range(q.shape[1]):
        query, key, value = q[:, head].to(dtype), k[:, head // groups].to(dtype), v[:, head // groups].to(dtype)
        scores = query @ key.T * SCALE
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        outs.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ value)
    return torch.stack(outs, 1)


def problem(tokens, heads, kv_heads, width, dtype, seed=0):
    """q and v are slices of something wider, as of a fused projection; k has its heads outside; and ∂out."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    q = (2 * draw(tokens, heads + 1, width + 8)).to(DEVICE, dtype)[:, :heads, :width]
    k = (2 * draw(kv_heads, tokens, width)).to(DEVICE, dtype).transpose(0, 1)
    v = draw(tokens, kv_heads + 2, width).to(DEVICE, dtype)[:, 1 : kv_heads + 1]
    grad = draw(tokens, heads, width).to(DEVICE, dtype)
    return q, k, v, grad


def with_gradients(function, tensors, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_close(found, expected, theirs, factor=2.0):
    """An error of at most twice torch's own, output and gradients."""
    for name, one, two, three in zip(("out", "q", "k", "v"), found, expected, theirs):
        assert one.isfinite().all(), name
        floor = 4e-6 if one.dtype == torch.float32 else torch.finfo(one.dtype).eps
        floor *= two.abs().max().item()
        assert distance(one, two) <= factor * distance(three, two) + floor, name


CASES = [(pack, rule, heads, torch.float32) for pack in PACKS for rule, heads in zip(RULES, itertools.cycle(HEADS))]
CASES += [("mixed", rule, heads, dtype) for rule, heads in zip(RULES, HEADS[::-1]) for dtype in TYPES[:1] + TYPES[2:]]


@runs
@pytest.mark.parametrize(("pack", "rule", "heads", "dtype"), CASES, ids=str)
def test_error_is_at_most_twice_torchs(pack, rule, heads, dtype, small_tiles, filled_with_nan):
    lengths, prompts = PACKS[pack]
    *tensors, grad = problem(sum(lengths), *heads, dtype)
    segments, mask = Segments.of(lengths, prompts, DEVICE), sees(lengths, prompts, rule.get("window")).to(DEVICE)
    run = lambda *leaves: ours.attention(*leaves, segments, scale=SCALE, **rule)  # noqa: E731
    found = with_gradients(run, tensors, grad)
    expected = with_gradients(lambda *leaves: exact(*leaves, mask, rule.get("softcap")), tensors, grad)
    theirs = with_gradients(lambda *leaves: exact(*leaves, mask, rule.get("softcap"), dtype), tensors, grad)
    assert found[0].dtype == dtype and found[0].is_contiguous()
    assert_close(found, expected, theirs)


@runs
def test_query_heads_of_one_key_head_in_several_programs(small_tiles, filled_with_nan, monkeypatch):
    lengths, prompts = [20, 9, 5], [0, 0, 0]
    *tensors, grad = problem(sum(lengths), 4, 1, 16, torch.float32)
    run = lambda *leaves: ours.attention(*leaves, Segments.of(lengths, prompts, DEVICE), scale=SCALE)  # noqa: E731
    results = []
    for parts in (1, 2):
        monkeypatch.setattr(ours, "head_parts", lambda group, wanted, parts=parts: parts)
        results.append(with_gradients(run, tensors, grad))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])
        torch.testing.assert_close(other[2:], results[0][2:], rtol=1e-5, atol=1e-5)


@runs
@pytest.mark.parametrize("window", [None, 25])
def test_nothing_passes_between_siblings_and_packs(window, small_tiles):
    """NaN in one completion stays there, save in its prompt's gradients; the rest keeps every bit."""
    lengths, prompts = [20, 12, 9, 18, 30], [0, 0, 0, 0, 4]
    *tensors, grad = problem(sum(lengths), 2, 1, 16, torch.float32)
    segments = Segments.of(lengths, prompts, DEVICE)
    run = lambda *leaves: ours.attention(*leaves, segments, scale=SCALE, window=window)  # noqa: E731
    clean = with_gradients(run, tensors, grad)
    spoilt = slice(32, 41)  # the second completion
    for tensor in (*tensors, grad):
        tensor[spoilt] = float("nan")
    rest = torch.ones(sum(lengths), dtype=torch.bool)
    rest[spoilt] = False
    found = with_gradients(run, tensors, grad)
    for one, two in zip(found[:2], clean[:2]):
        assert torch.equal(one[rest], two[rest]) and one[spoilt].isnan().all()
    rest[:20] = False  # what its keys' gradients are, all completions decide
    for one, two in zip(found[2:], clean[2:]):
        assert torch.equal(one[rest], two[rest])


@runs
def test_no_tokens_and_segments_of_no_tokens(small_tiles):
    empty = torch.empty(0, 2, 16, device=DEVICE, requires_grad=True)
    out = ours.attention(empty, empty, empty, Segments.of([], device=DEVICE), scale=1.0)
    assert out.shape == (0, 2, 16) and torch.autograd.grad(out.sum(), empty)[0].shape == (0, 2, 16)
    q, k, v, _ = problem(7, 1, 1, 16, torch.float32)
    some = ours.attention(q, k, v, Segments.of([0, 3, 0, 4, 0], [0, 1, 1, 1, 1], DEVICE), scale=SCALE)
    same = ours.attention(q, k, v, Segments.of([3, 4], [0, 0], DEVICE), scale=SCALE)
    assert torch.equal(some, same)


def test_blocks_by_hand():
    """A prompt of 5 with completions of 2 and 6, then a sequence of 3, in blocks of 4."""
    segments = Segments.of([5, 2, 6, 3], [0, 0, 0, 3])
    queries = query_blocks(segments, 4).tolist()
    # first token, tokens, position, token at position 0, tokens of the prompt; the most keys first
    assert queries == [
        [11, 2, 9, 0, 5], [7, 4, 5, 0, 5], [5, 2, 5, 0, 5], [4, 1, 4, 0, 0], [0, 4, 0, 0, 0], [13, 3, 0, 13, 0]
    ]  # fmt: skip
    keys = key_blocks(segments, 4, None)
    assert visited(keys) == {0: [(0, 13, 0)], 4: [(4, 13, 4)], 5: [(5, 7, 5)], 7: [(7, 13, 5)], 11: [(11, 13, 9)],
                             13: [(13, 16, 0)]}  # fmt: skip
    assert keys.blocks[:, 0].tolist() == [0, 4, 7, 13, 5, 11]
    assert keys.equal_programs == pytest.approx((13 + 9 + 6 + 3 + 2 + 2) / 13)
    # Within 3 positions: the key at 3 is seen up to position 5, the first of each completion; the one at 4 by two.
    assert visited(key_blocks(segments, 4, 3)) == {
        0: [(0, 5, 0), (5, 6, 5), (7, 8, 5)], 4: [(4, 5, 4), (5, 7, 5), (7, 9, 5)], 5: [(5, 7, 5)], 7: [(7, 13, 5)],
        11: [(11, 13, 9)], 13: [(13, 16, 0)],
    }  # fmt: skip
    assert query_blocks(segments, 4) is query_blocks(segments, 4), "worked out once for all layers"


def visited(keys):
    return {
        first: [tuple(visit) for visit in keys.visits[low:high].tolist()]
        for first, _, _, low, high in keys.blocks.tolist()
    }


@pytest.mark.parametrize(
    ("group", "wanted", "parts"), [(4, 0.3, 1), (4, 1.2, 2), (6, 2.5, 3), (4, 9.0, 4), (1, 5.0, 1)]
)
def test_into_how_many_programs_the_heads_are_divided(group, wanted, parts):
    assert ours.head_parts(group, wanted) == parts


absent = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
LONG = {
    "apart": ([1000, 333, 1, 716], None),
    "groups": ([700, 256, 40, 300, 1, 129, 600, 25], [0, 0, 0, 0, 4, 5, 5, 5]),
}


def flash(q, k, v, lengths):
    """torch's, over sequences that share nothing."""
    from torch.nn.attention.varlen import varlen_attn

    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    longest = max(lengths)
    return varlen_attn(q.contiguous(), k, v, bounds, bounds, longest, longest, scale=SCALE, window_size=(-1, 0))


@pytest.mark.gpu
@absent
@pytest.mark.parametrize("pack", LONG)
@pytest.mark.parametrize(("rule", "heads"), [
    ({}, (8, 2, 128)), ({}, (6, 2, 64)), ({"window": 300}, (4, 4, 96)), ({"softcap": 5.0}, (4, 1, 256)),
    ({"window": 130}, (4, 1, 256)),
], ids=str)  # fmt: skip
def test_real_tiles_in_bfloat16(pack, rule, heads, filled_with_nan):
    lengths, prompts = LONG[pack]
    *tensors, grad = problem(sum(lengths), *heads, torch.bfloat16)
    segments, mask = Segments.of(lengths, prompts, DEVICE), sees(lengths, prompts, rule.get("window")).to(DEVICE)
    run = lambda *leaves: ours.attention(*leaves, segments, scale=SCALE, **rule)  # noqa: E731
    found = with_gradients(run, tensors, grad)
    expected = with_gradients(lambda *leaves: exact(*leaves, mask, rule.get("softcap")), tensors, grad)
    theirs = with_gradients(lambda *leaves: exact(*leaves, mask, rule.get("softcap"), torch.bfloat16), tensors, grad)
    assert_close(found, expected, theirs)
    for _ in range(5):
        again = with_gradients(run, tensors, grad)
        assert all(torch.equal(one, two) for one, two in zip(again, found)), "other bits the next time"


@pytest.mark.gpu
@absent
@pytest.mark.parametrize("width", [64, 128])
def test_as_near_to_float64_as_flash_attention(width):
    lengths = LONG["apart"][0]
    *tensors, grad = problem(sum(lengths), 8, 2, width, torch.bfloat16)
    mask = sees(lengths, None).to(DEVICE)
    segments = Segments.of(lengths, device=DEVICE)
    found = with_gradients(lambda *leaves: ours.attention(*leaves, segments, scale=SCALE), tensors, grad)
    theirs = with_gradients(lambda *leaves: flash(*leaves, lengths), tensors, grad)
    assert_close(found, with_gradients(lambda *leaves: exact(*leaves, mask), tensors, grad), theirs, factor=1.5)


COMPILED = [*((capability, 128) for capability in CAPABILITIES), (75, 256), (89, 256), (90, 256), (90, 64), (80, 96)]
KERNELS = {
    "forward": ours._attention_fwd_kernel,
    "query_gradient": ours._attention_bwd_dq_kernel,
    "key_gradient": ours._attention_bwd_dkdv_kernel,
}
GPUS = {75: "scalar", 80: "ampere", 89: "ada", 90: "hopper"}


def compile_for(capability, name, width, element, kind, **changes):
    kernel, block_d = KERNELS[name], 1 << (width - 1).bit_length()
    tiles = getattr(ours.TILES[kind, block_d], name)
    halves = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    pointers = {argument: element for argument in halves if argument in kernel.arg_names}
    pointers |= {argument: "fp32" for argument in ("lse_ptr", "delta_ptr") if argument in kernel.arg_names}
    pointers |= {argument: "i32" for argument in ("blocks_ptr", "visits_ptr") if argument in kernel.arg_names}
    rows = (tiles.step, tiles.kept) if name == "key_gradient" else (tiles.kept, tiles.step)
    constants = {"HEAD_DIM": width, "BLOCK_D": block_d, "WINDOW": False, "SOFTCAP": False}
    constants |= {"BLOCK_M": rows[0], "BLOCK_N": rows[1]} | changes
    floats = tuple(argument for argument in ("inner", "factor", "scale") if argument in kernel.arg_names)
    aligned = tuple(argument for argument in kernel.arg_names if argument.startswith("stride_"))
    return compiled(
        kernel, capability, pointers, constants, floats=floats, aligned=aligned, warps=tiles.warps, stages=tiles.stages
    )


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("capability", "width"), COMPILED)
def test_it_compiles_for_gpus_that_are_not_here(capability, width, name):
    found = compile_for(capability, name, width, "fp16" if capability == 75 else "bf16", GPUS[capability])
    assert ("wgmma" in found.asm["ptx"]) == (capability == 90), "Hopper's tensor cores"
    assert ("mma" in found.asm["ptx"]) == (capability >= 80)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("name", KERNELS)
def test_window_softcap_and_float32_compile(name):
    compile_for(90, name, 80, "bf16", "hopper", WINDOW=True, SOFTCAP=True)
    compile_for(90, name, 64, "fp16", "hopper", N=1, K=1)  # integers of 1 are constants to Triton
    compile_for(89, name, 256, "fp32", "scalar")
