"""Groups to micro-batches: counts, packing, advantages, and that the cut never changes the gradient."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rl.algorithms import ALGORITHMS, Algorithm, parse
from posttrain.rl.batching import BatchSettings, assign_advantages, plan, plan_supervised, with_scores
from posttrain.rl.metrics import values
from posttrain.rl.types import Completion, FinishReason, Prompt, Rollout, RolloutGroup, Scores, TrainBatch

from .packed_step import LENGTHS, groups, model, padded, score, step_gradient

NAMES = sorted(ALGORITHMS)


def rollout(
    length: int, reward: float = 0.0, finish: FinishReason = "stop", rewards: dict[str, float | None] | None = None
) -> Rollout:
    completion = Completion(tuple(range(1, length + 1)), tuple(-0.1 * i for i in range(length)), "", finish, 0)
    scores = {"r": reward} if rewards is None else rewards
    return Rollout(completion, scores, reward, counted=scores, weights=dict.fromkeys(scores, 1.0))


def group(*rollouts: Rollout, prompt_ids: tuple[int, ...] = (90, 91)) -> RolloutGroup:
    return RolloutGroup(Prompt("p", "the same text", {}, prompt_ids), list(rollouts))


def settings(micro_batch_tokens: int = 1000, updates: int = 1) -> BatchSettings:
    return BatchSettings(micro_batch_tokens, updates, max_tokens=300, temperature=0.7)


# --- the contract -----------------------------------------------------------------------------------------------------


def algorithm_with_everything(name: str) -> Algorithm:
    if name == "cross_entropy":
        return parse(name)
    correction = "opsm" if name in ("vespo", "dppo") else "tis"
    return parse({"name": name, "kl_coef": 0.05, "entropy_coef": 0.01, "top_entropy": 0.6, "correction": correction})


@functools.cache
def scores(seed: int, micro_batch_tokens: int) -> list[Scores]:
    """What ``Learner.score`` would give for another model; packing does not depend on the algorithm."""
    [step] = plan(groups(), parse("grpo"), settings(micro_batch_tokens))
    with torch.no_grad():
        return [Scores(*score(model(seed), batch)) for batch in step]


def cut(name: str, micro_batch_tokens: int) -> tuple[Algorithm, list[TrainBatch]]:
    algorithm = algorithm_with_everything(name)
    batch = groups()
    assign_advantages(batch, algorithm, 300)
    [step] = plan(batch, algorithm, settings(micro_batch_tokens))
    old, ref = scores(1, micro_batch_tokens), scores(2, micro_batch_tokens)
    return algorithm, with_scores(step, old=old, ref=ref, entropy_quantile=algorithm.entropy_quantile)


def near(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """A policy a little away from the old one (seed 1), so that ratios are not 1."""
    generator = torch.Generator().manual_seed(5)
    return [
        (old.detach() + 0.05 * torch.randn(old.shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for old in weights
    ]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bnpo"])
def test_any_cut_of_a_step_into_micro_batches_gives_the_same_gradient(name: str) -> None:
    """24 sequences of lengths 1…300 in 1, 3 or 24 micro-batches, shuffled, and padded instead of packed."""
    policy = near(model(1))
    algorithm, whole = cut(name, 10**6)
    assert len(whole) == 1
    assert sorted(LENGTHS)[0] == 1
    expected = step_gradient(policy, whole, algorithm)
    scale = expected.abs().max().item()
    assert scale > 1e-4

    _, three = cut(name, 730)
    _, single = cut(name, 1)
    shuffled = random.Random(3).sample(single, len(single))
    wide = [padded(batch, 320) for batch in three]
    assert [len(three), len(single)] == [3, 24]
    for batches in (three, single, shuffled, three[::-1], wide):
        got = step_gradient(policy, batches, algorithm)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * scale)
        assert ((got - expected).norm() / expected.norm()).item() < 1e-12


def test_bnpo_alone_depends_on_the_cut() -> None:
    """Divided by each micro-batch's own tokens, 24 micro-batches give a gradient that is off by 3.9 times its size."""
    policy = near(model(1))
    algorithm, whole = cut("bnpo", 10**6)
    _, single = cut("bnpo", 1)
    expected = step_gradient(policy, whole, algorithm)
    got = step_gradient(policy, single, algorithm)
    relative = ((got - expected).norm() / expected.norm()).item()
    assert relative == pytest.approx(3.931, rel=0.01)
    token_mean = step_gradient(policy, whole, parse({**algorithm.model_dump(), "name": "grpo"} | TOKEN_MEAN))
    torch.testing.assert_close(expected, token_mean, rtol=1e-12, atol=0)


TOKEN_MEAN = {"aggregation": "token_mean"}


def test_the_order_of_groups_does_not_change_the_gradient() -> None:
    policy = near(model(1))
    algorithm = parse("grpo")
    gradients = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        everything = groups()
        batch = [everything[i] for i in order]
        assign_advantages(batch, algorithm, 300)
        [step] = plan(batch, algorithm, settings(730))
        with torch.no_grad():
            old = [Scores(*score(model(1), micro)) for micro in step]
        gradients.append(step_gradient(policy, with_scores(step, old=old), algorithm))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_without_old_scores_the_ratio_is_exactly_one() -> None:
    algorithm = parse("grpo")
    batch = groups()
    assign_advantages(batch, algorithm, 300)
    [step] = plan(batch, algorithm, settings())
    assert all(micro.old_logprobs is None for micro in step)


# --- plan -------------------------------------------------------------------------------------------------------------


def test_one_micro_batch_spelled_out() -> None:
    a, b = rollout(2), rollout(1)
    a.advantage, b.advantage = 0.5, -1.5
    [[batch]] = plan([group(a, b)], parse("grpo"), settings())
    assert batch.input_ids.tolist() == [90, 91, 1, 2, 90, 91, 1]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.loss_mask.tolist() == [False, False, True, True, False, False, True]
    assert batch.advantages.tolist() == [0, 0, 0.5, 0.5, 0, 0, -1.5]
    assert batch.rollout_logprobs is not None
    assert batch.rollout_logprobs.tolist() == pytest.approx([0, 0, 0, -0.1, 0, 0, 0])
    assert (batch.num_loss_tokens, batch.num_sequences, batch.num_micro_batches) == (3, 2, 1)
    assert (batch.max_tokens, batch.temperature) == (300, 0.7)
    assert [t.dtype for t in (batch.input_ids, batch.cu_seqlens, batch.loss_mask, batch.advantages)] == [
        torch.int64,
        torch.int32,
        torch.bool,
        torch.float32,
    ]


def test_counts_are_those_of_the_whole_optimizer_step_on_every_micro_batch() -> None:
    """Dividing by a micro-batch's own tokens is trl's issue 3021; two updates do not count each other's."""
    batch = [group(rollout(3), rollout(5)), group(rollout(7), rollout(1))]
    first, second = plan(batch, parse("grpo"), settings(6, updates=2))
    assert [len(first), len(second)] == [2, 2]
    assert {(b.num_loss_tokens, b.num_sequences, b.num_micro_batches) for b in first} == {(8, 2, 2)}
    assert {(b.num_loss_tokens, b.num_sequences, b.num_micro_batches) for b in second} == {(8, 2, 2)}
    assert sum(int(b.loss_mask.sum()) for b in first) == 8


def test_truncated_completions_leave_numerator_and_denominator_under_the_overlong_filter() -> None:
    """trl's issue 6369: gone from the sum but still counted."""
    batch = [group(rollout(4), rollout(9, finish="length"), rollout(2))]
    algorithm = parse({"name": "grpo", "overlong_filter": True})
    [[packed]] = plan(batch, algorithm, settings())
    assert (packed.num_loss_tokens, packed.num_sequences) == (6, 2)
    assert packed.cu_seqlens.tolist() == [0, 6, 10]
    [[everything]] = plan(batch, parse("grpo"), settings())
    assert (everything.num_loss_tokens, everything.num_sequences) == (15, 3)


def test_a_step_whose_completions_are_all_dropped_is_left_out() -> None:
    batch = [group(rollout(9, finish="length")), group(rollout(4))]
    algorithm = parse({"name": "grpo", "overlong_filter": True})
    assert len(plan(batch, algorithm, settings(updates=2))) == 1
    assert plan(batch[:1], algorithm, settings()) == []
    assert plan([], algorithm, settings(updates=2)) == []


def test_an_empty_completion_is_not_counted() -> None:
    [[batch]] = plan([group(rollout(0, finish="abort"), rollout(2))], parse("grpo"), settings())
    assert (batch.num_sequences, batch.num_loss_tokens) == (1, 2)


@pytest.mark.parametrize(("number", "updates", "shares"), [(8, 4, [2, 2, 2, 2]), (7, 3, [2, 2, 3]), (2, 3, [1, 1])])
def test_groups_are_dealt_out_in_order_and_never_split(number: int, updates: int, shares: list[int]) -> None:
    batch = [group(rollout(3), rollout(4), prompt_ids=(100 + i,)) for i in range(number)]
    steps = plan(batch, parse("grpo"), settings(7, updates))
    seen = [sorted({int(b.input_ids[s]) for b in step for s in b.cu_seqlens[:-1]}) for step in steps]
    assert [len(share) for share in seen] == shares
    assert [first for share in seen for first in share] == [100 + i for i in range(number)]
    assert [step[0].num_sequences for step in steps] == [2 * n for n in shares]


def test_a_sequence_longer_than_the_budget_gets_its_own_micro_batch_whole() -> None:
    [step] = plan([group(rollout(50), rollout(3), rollout(2))], parse("grpo"), settings(10))
    assert sorted(b.input_ids.numel() for b in step) == [9, 52]
    assert sorted(b.cu_seqlens.numel() - 1 for b in step) == [1, 2]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 60))
def test_packing_keeps_every_sequence_under_the_budget_and_near_the_best(lengths: list[int], budget: int) -> None:
    batch = [group(*[rollout(n) for n in lengths], prompt_ids=(7,))]
    [step] = plan(batch, parse("grpo"), settings(budget))
    packed = sorted(n for b in step for n in b.cu_seqlens.diff().tolist())
    assert packed == sorted(n + 1 for n in lengths)
    for b in step:
        assert b.input_ids.numel() <= budget or b.cu_seqlens.numel() == 2
    fitting = [n + 1 for n in lengths if n + 1 <= budget]
    least = math.ceil(sum(fitting) / budget)
    assert len(step) - (len(lengths) - len(fitting)) <= 2 * least
    again = plan(batch, parse("grpo"), settings(budget))[0]
    assert [b.input_ids.tolist() for b in step] == [b.input_ids.tolist() for b in again]


def test_first_fit_decreasing_fills_the_gaps() -> None:
    """Lengths 6 5 5 4 4 3 3 in bins of 10: 6+4, 5+5, 4+3+3."""
    [step] = plan(
        [group(*[rollout(n - 1) for n in (3, 5, 4, 6, 5, 3, 4)], prompt_ids=(7,))], parse("grpo"), settings(10)
    )
    assert [sorted(b.cu_seqlens.diff().tolist()) for b in step] == [[4, 6], [5, 5], [3, 3, 4]]


def test_where_prompts_are_shared_groups_stay_together_and_count_their_prompt_once() -> None:
    """Groups of 3 + 2 + 4 + 1, 3 + 5 + 5 and 2 + 1 tokens: 10, 13 and 3, in micro-batches of 13: 13 and 10 + 3. Counted
    in full they are 16, 16 and 3.
    """
    batch = [
        group(rollout(2), rollout(4), rollout(1), prompt_ids=(90, 91, 92)),
        group(rollout(5), rollout(5), prompt_ids=(90, 91, 93)),
        group(rollout(1), prompt_ids=(90, 91)),
    ]
    [step] = plan(batch, parse("grpo"), replace(settings(13), share_prompts=True))
    assert [b.cu_seqlens.diff().tolist() for b in step] == [[8, 8], [5, 7, 4, 3]]
    assert [b.input_ids[b.cu_seqlens[:-1].long() + 2].tolist() for b in step] == [[93, 93], [92, 92, 92, 1]]
    assert {(b.num_loss_tokens, b.num_sequences, b.num_micro_batches) for b in step} == {(18, 6, 2)}
    [unshared] = plan(batch, parse("grpo"), settings(13))
    assert len(unshared) == 3


@pytest.mark.parametrize("budget", [10**6, 730, 320, 64, 1])
def test_keeping_groups_together_does_not_change_the_gradient(budget: int) -> None:
    policy = near(model(1))
    algorithm, batch = parse("grpo"), groups()
    assign_advantages(batch, algorithm, 300)
    gradients = []
    for share in (False, True):
        [step] = plan(batch, algorithm, replace(settings(budget), share_prompts=share))
        with torch.no_grad():
            old = [Scores(*score(model(1), micro)) for micro in step]
        gradients.append(step_gradient(policy, with_scores(step, old=old), algorithm))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


# --- advantages -------------------------------------------------------------------------------------------------------


def test_groups_go_by_identity_not_by_the_prompts_text() -> None:
    """The same prompt drawn twice is two groups: (1, 0) and (5, 5) do not mix."""
    batch = [group(rollout(1, 1.0), rollout(1, 0.0)), group(rollout(1, 5.0), rollout(1, 5.0))]
    assign_advantages(batch, parse("dr_grpo"), 10)
    assert [[r.advantage for r in g.rollouts] for g in batch] == [[0.5, -0.5], [0.0, 0.0]]


def test_uneven_groups_get_their_own_means() -> None:
    batch = [group(rollout(1, 1.0), rollout(1, 0.0), rollout(1, 0.5)), group(rollout(1, 3.0)), group(rollout(1, 4.0))]
    batch.append(group(rollout(1, 2.0), rollout(1, 0.0)))
    metrics = values(assign_advantages(batch, parse("dr_grpo"), 10))
    assert [[r.advantage for r in g.rollouts] for g in batch] == [[0.5, -0.5, 0.0], [0.0], [0.0], [1.0, -1.0]]
    assert metrics["policy/advantage_zero"] == pytest.approx(3 / 7)
    assert metrics["policy/advantage_std"] == pytest.approx(math.sqrt(2.5 / 6))


def test_soft_overlong_punishment_enters_the_reward() -> None:
    """Budget 10, buffer 2: lengths 8, 9 and 10 lose 0, .5 and 1."""
    batch = [group(rollout(8, 1.0), rollout(9, 1.0), rollout(10, 1.0))]
    algorithm = parse({"name": "dr_grpo", "overlong_buffer": 0.2})
    metrics = values(assign_advantages(batch, algorithm, 10))
    assert [r.advantage for r in batch[0].rollouts] == pytest.approx([0.5, 0.0, -0.5])
    assert metrics["reward/length_penalty"] == pytest.approx(-0.5)
    assert [r.reward for r in batch[0].rollouts] == [1.0, 1.0, 1.0]


def test_gdpo_sees_every_reward_and_the_length_penalty_by_itself() -> None:
    """Equal rewards and different penalties: the penalty alone decides, standardised."""
    batch = [group(rollout(8, 1.0), rollout(10, 1.0))]
    assign_advantages(batch, parse({"name": "gdpo", "overlong_buffer": 0.2}), 10)
    assert [r.advantage for r in batch[0].rollouts] == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)


def test_gdpo_leaves_out_a_reward_that_does_not_apply() -> None:
    scores = [{"a": 1.0, "b": None}, {"a": 0.0, "b": None}, {"a": 0.5, "b": 2.0}, {"a": 0.5, "b": 4.0}]
    batch = [group(*[rollout(2, 0.0, rewards=dict(s)) for s in scores])]
    assign_advantages(batch, parse("gdpo"), 10)
    first = 0.5 / (math.sqrt(1 / 6) + 1e-6)
    second = 1 / (math.sqrt(2) + 1e-6)
    raw = [first, -first, -second, second]
    std = math.sqrt(2 * (first**2 + second**2) / 3)
    assert [r.advantage for r in batch[0].rollouts] == pytest.approx([v / (std + 1e-6) for v in raw], rel=1e-12)


def test_gdpo_sees_what_counts_with_the_weights_of_the_step() -> None:
    """Right answers (1 1 0 0) count in the right form (1 0 1 0) alone: 1 0 0 0, mean 1/4, std 1/2. The form: std √⅓."""
    rollouts = []
    for right, form in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        one = rollout(2, 0.0, rewards={"right": right, "form": form, "metric": 100 * right})
        one.counted, one.weights = {"right": right * form, "form": form}, {"right": 2.0, "form": 0.5}
        rollouts.append(one)
    assign_advantages([group(*rollouts)], parse("gdpo"), 10)
    right, form = 0.75 / (0.5 + 1e-6), 0.5 / (math.sqrt(1 / 3) + 1e-6)
    raw = [2 * right + form / 2, -2 * right / 3 - form / 2, -2 * right / 3 + form / 2, -2 * right / 3 - form / 2]
    std = math.sqrt(sum(value**2 for value in raw) / 3)
    assert [r.advantage for r in rollouts] == pytest.approx([value / (std + 1e-6) for value in raw], rel=1e-12)


def test_a_completion_that_only_a_metric_scores_has_no_reward() -> None:
    scored = rollout(2, 0.0, rewards={"metric": 3.0, "r": None})
    scored.counted, scored.weights = {"r": None}, {"r": 1.0}
    batch = [group(rollout(2, 1.0), scored, rollout(2, 0.0))]
    assign_advantages(batch, parse("dr_grpo"), 10)
    assert [r.advantage for r in batch[0].rollouts] == [0.5, 0.0, -0.5]


def test_a_completion_no_reward_applies_to_stays_out_of_its_group() -> None:
    batch = [group(rollout(2, 1.0), rollout(2, 0.0, rewards={"r": None}), rollout(2, 0.0))]
    assign_advantages(batch, parse("dr_grpo"), 10)
    assert [r.advantage for r in batch[0].rollouts] == [0.5, 0.0, -0.5]


def test_truncated_completions_still_count_in_their_groups_mean_under_the_overlong_filter() -> None:
    batch = [group(rollout(2, 1.0), rollout(9, 0.0, finish="length"), rollout(2, 0.5))]
    assign_advantages(batch, parse({"name": "dr_grpo", "overlong_filter": True}), 10)
    assert [r.advantage for r in batch[0].rollouts] == [0.5, -0.5, 0.0]


def test_truncated_completions_have_no_tokens_in_token_weighted_estimators_under_the_filter() -> None:
    batch = [group(rollout(2, 1.0), rollout(9, 0.0, finish="length"), rollout(2, 0.5))]
    assign_advantages(batch, parse({"name": "opo", "overlong_filter": True}), 10)
    assert [r.advantage for r in batch[0].rollouts] == [0.25, -0.75, -0.25]


def test_no_rollouts_give_no_metrics() -> None:
    assert assign_advantages([], parse("grpo"), 10) == {}
    assert assign_advantages([group()], parse("grpo"), 10) == {}


# --- supervised and scores --------------------------------------------------------------------------------------------


def test_supervised_batches_train_on_every_completion_token_with_weight_one() -> None:
    step = plan_supervised([((1, 2), (3, 4, 5)), ((6,), (7,)), ((8,), ())], 5, 64)
    assert [b.input_ids.tolist() for b in step] == [[1, 2, 3, 4, 5], [6, 7]]
    assert [b.loss_mask.tolist() for b in step] == [[False, False, True, True, True], [False, True]]
    assert [b.advantages.tolist() for b in step] == [[0, 0, 1, 1, 1], [0, 1]]
    assert {(b.num_loss_tokens, b.num_sequences, b.num_micro_batches, b.max_tokens) for b in step} == {(4, 2, 2, 64)}
    assert all(b.rollout_logprobs is None for b in step)
    assert plan_supervised([], 5, 64) == []


def test_scores_fill_each_micro_batch_and_the_threshold_spans_the_step() -> None:
    batch = [group(rollout(3), prompt_ids=(7,)), group(rollout(2), prompt_ids=(7,))]
    [step] = plan(batch, parse("grpo"), settings(4))
    old = [
        Scores(torch.tensor([9.0, -1.0, -2.0, -3.0]), torch.tensor([99.0, 0.0, 1.0, 2.0])),
        Scores(torch.tensor([9.0, -4.0, -5.0]), torch.tensor([99.0, 3.0, 4.0])),
    ]
    ref = [replace(s, logprobs=s.logprobs - 1) for s in old]
    filled = with_scores(step, old=old, ref=ref, entropy_quantile=0.8)
    for got, expected, reference in zip(filled, old, ref, strict=True):
        assert got.old_logprobs is expected.logprobs
        assert got.ref_logprobs is reference.logprobs
    # entropies 0 1 2 3 4 of the loss tokens alone: the .8 quantile lies at .8 · 4 = 3.2
    assert [b.entropy_threshold for b in filled] == pytest.approx([3.2, 3.2])
    assert with_scores(step) == step
    assert all(b.entropy_threshold is None for b in with_scores(step, old=old))


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_the_entropy_threshold_is_the_linear_quantile(q: float) -> None:
    entropy = torch.rand(33, generator=torch.Generator().manual_seed(0))
    [step] = plan([group(rollout(32), prompt_ids=(7,))], parse("grpo"), settings())
    [filled] = with_scores(step, old=[Scores(torch.zeros(33), entropy)], entropy_quantile=q)
    assert filled.entropy_threshold == pytest.approx(torch.quantile(entropy[1:].double(), q).item(), rel=1e-12)
