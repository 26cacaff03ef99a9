"""Scores, totals and metrics by hand; every way a function can misbehave; the loop is never blocked."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.rl.errors import RewardError
from posttrain.rl.metrics import merge, values
from posttrain.rl.rewards import Rubric, metric, reward
from posttrain.rl.types import Completion, Message, Prompt, RolloutGroup

Groups = list[tuple[Prompt, list[Completion]]]


def sample(text: str, ids: Sequence[int] = (1, 2), finish: Any = "stop") -> Completion:
    return Completion(tuple(ids), tuple(-0.5 for _ in ids), text, finish, 0)


def text_groups() -> Groups:
    return [
        (Prompt("0-7", "2+2=", {"answer": "4", "level": 1}), [sample("4"), sample("5", (9,))]),
        (Prompt("0-3", "1+1=", {"answer": "2", "level": 2}), [sample("2", (3, 4, 5), "length")]),
    ]


def chat_groups() -> Groups:
    turns: list[Message] = [{"role": "system", "content": "brief"}, {"role": "user", "content": "2+2="}]
    return [(Prompt("1-0", turns, {"answer": "4"}), [sample("4"), sample("no")])]


def run(rubric: Rubric, groups: Groups, step: int = 0) -> list[RolloutGroup]:
    return asyncio.run(rubric.score(groups, step=step))


def scores(function: Callable[..., Any], groups: Groups | None = None, step: int = 0) -> list[float | None]:
    """Raw scores of one function, flat."""
    rubric = Rubric([function])
    (name,) = rubric.names
    return [r.rewards[name] for group in run(rubric, groups or text_groups(), step) for r in group.rollouts]


def test_groups_come_back_in_order_with_weighted_totals() -> None:
    @reward(weight=2.0)
    def correct(completion: str, answer: str) -> float:
        return float(completion == answer)

    @reward(weight=-0.5)
    def level(level: int) -> int:
        return level

    groups = text_groups()
    result = run(Rubric([correct, level]), groups)
    assert [group.prompt for group in result] == [prompt for prompt, _ in groups]
    assert [r.completion for group in result for r in group.rollouts] == [c for _, cs in groups for c in cs]
    assert [r.rewards for group in result for r in group.rollouts] == [
        {"correct": 1.0, "level": 1.0},
        {"correct": 0.0, "level": 1.0},
        {"correct": 1.0, "level": 2.0},
    ]
    # 2·1 − .5·1, 2·0 − .5·1, 2·1 − .5·2
    assert [r.reward for group in result for r in group.rollouts] == [1.5, -0.5, 1.0]


def test_weights_by_name_replace_the_functions_own() -> None:
    @reward(weight=2.0, name="a")
    def first(completion: str) -> float:
        return 1.0

    def b(completion: str) -> float:
        return 10.0

    rubric = Rubric([first, b], {"a": {"weight": 0.25}})
    assert rubric.combining.weights(0) == {"a": 0.25, "b": 1.0}
    assert run(rubric, text_groups())[0].rollouts[0].reward == 10.25
    with pytest.raises(RewardError, match=r"weight, requires or clip for c, but the rewards are a, b"):
        Rubric([first, b], {"c": {"weight": 1.0}})
    with pytest.raises(RewardError, match="reward a: weight=nan: weight is a finite number"):
        Rubric([first], {"a": {"weight": math.nan}})


def test_a_posttrain_function_receives_by_name_what_it_asks_for() -> None:
    seen: list[dict[str, Any]] = []

    def everything(
        prompt, completion: str, completion_ids, finish_reason, messages, columns, prompt_id, step, answer, level=0
    ):
        seen.append(dict(locals()) | {"seen": None})
        return 0

    scores(everything, step=12)
    last = seen[-1]
    assert last["prompt"] == "1+1=" and last["completion"] == "2" and last["completion_ids"] == [3, 4, 5]
    assert last["finish_reason"] == "length" and last["answer"] == "2" and last["level"] == 2 and last["step"] == 12
    assert last["messages"] == [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    assert last["columns"] == {"answer": "2", "level": 2} and last["prompt_id"] == "0-3"


def test_a_posttrain_function_gets_text_for_chat_rows_too() -> None:
    def both(prompt: str, completion: str) -> float:
        assert prompt == "2+2="
        return float(completion == "4")

    assert scores(both, chat_groups()) == [1.0, 0.0]


def test_kwargs_receive_every_column() -> None:
    def everything(completion: str, **kwargs: Any) -> float:
        return float(kwargs["level"])

    assert scores(everything) == [1.0, 1.0, 2.0]


def test_trl_function_on_text_rows_gets_strings_and_columns_as_lists() -> None:
    def accuracy(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
        assert prompts == ["2+2=", "2+2=", "1+1="] and kwargs["level"] == [1, 1, 2]
        assert completion_ids == [[1, 2], [9], [3, 4, 5]] and trainer_state.global_step == 3
        return [1.0 if c == a else 0.0 for c, a in zip(completions, answer, strict=True)]

    assert scores(accuracy, step=3) == [1.0, 0.0, 1.0]


def test_trl_function_on_chat_rows_gets_messages() -> None:
    def length(prompts, completions, **kwargs):
        assert prompts[0][0]["role"] == "system" and len(prompts) == 2
        return [float(len(completion)) if completion[0]["role"] == "assistant" else None for completion in completions]

    assert scores(length, chat_groups()) == [1.0, 1.0]


def test_trl_function_written_for_messages_works_on_text_rows() -> None:
    def think_format(completions: list[list[dict[str, str]]], **kwargs) -> list[float]:
        contents = [completion[0]["content"] for completion in completions]
        return [float(content == "4") for content in contents]

    def by_body(completions, **kwargs):
        return [float(completion[0]["content"] == "4") for completion in completions]

    assert scores(think_format) == [1.0, 0.0, 0.0]
    assert scores(by_body) == [1.0, 0.0, 0.0]


def test_trl_log_arguments_keep_their_defaults() -> None:
    def logging(completions, log_extra=None, log_metric=None, **kwargs):
        return [float(log_extra is None and log_metric is None) for _ in completions]

    assert scores(logging) == [1.0, 1.0, 1.0]


def test_verifiers_function_gets_messages_state_and_defaults() -> None:
    async def exact_match(prompt, completion, answer, state, info, task) -> float:
        assert completion[-1].content == completion[-1]["content"]  # newer verifiers allow both
        assert state["prompt"] == prompt and state["completion"] == completion and state["answer"] == answer
        assert info == {} and task == "default"
        return 1.0 if completion[-1]["content"] == answer else 0.0

    assert scores(exact_match, chat_groups()) == [1.0, 0.0]


def test_verifiers_functions_of_one_sample_share_its_state() -> None:
    async def first(completion, state):
        state["cached"] = completion[-1]["content"]
        return 0.0

    async def second(completion, state):
        await asyncio.sleep(0.01)
        return float(state["cached"] == completion[-1]["content"])

    result = run(Rubric([first, second]), chat_groups())
    assert [r.rewards["second"] for r in result[0].rollouts] == [1.0, 1.0]


def test_partials_methods_and_callable_objects_run() -> None:
    class Grader:
        def __init__(self, wanted: str) -> None:
            self.wanted = wanted

        def __call__(self, completion: str) -> bool:
            return completion == self.wanted

        def batch(self, completions, **kwargs):
            return [completion == self.wanted for completion in completions]

    def equals(completion: str, wanted: str) -> bool:
        return completion == wanted

    for function in (Grader("5"), Grader("5").batch, functools.partial(equals, wanted="5")):
        assert scores(function) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("value", "score"),
    [(True, 1.0), (3, 3.0), (np.float32(0.5), 0.5), (np.bool_(True), 1.0), (torch.tensor(0.25), 0.25), (None, None)],
)
def test_numbers_of_any_library_count(value: Any, score: float | None) -> None:
    def own(completion: str):
        return value

    def trl(completions, **kwargs):
        return [value for _ in completions]

    for function in (own, trl):
        (first, *_) = scores(function)
        assert first == score and (score is None or type(first) is float)


def test_trl_may_return_a_tensor_or_an_array() -> None:
    def tensor(completions, **kwargs):
        return torch.arange(len(completions))

    def array(completions, **kwargs):
        return np.arange(len(completions)) / 2

    assert scores(tensor) == [0.0, 1.0, 2.0] and scores(array) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "returned nan on prompt 0-3 sample 0"),
        (-math.inf, "returned -inf on prompt 0-3 sample 0"),
        ("1.0", "returned str '1.0' on prompt 0-3 sample 0: return a number"),
        ([1.0], r"returned list \[1.0\] on prompt 0-3 sample 0"),
        ({"score": 1.0}, "returned dict"),
        (np.zeros(2), "returned ndarray"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_no_score_names_function_and_sample(value: Any, message: str, asynchronous: bool) -> None:
    def wrong(completion: str, answer: str):
        return value if answer == "2" else 0.0

    async def wrong_async(completion: str, answer: str):
        return value if answer == "2" else 0.0

    with pytest.raises(RewardError, match=f"reward wrong.*{message}"):
        scores(wrong_async if asynchronous else wrong)


def test_wrong_length_names_function_and_numbers() -> None:
    def short(completions, **kwargs):
        return [0.0] * (len(completions) - 1)

    with pytest.raises(RewardError, match="short returned 2 scores for 3 samples"):
        scores(short)


@pytest.mark.parametrize("value", [1.0, None, "111", {"a": 1}])
def test_trl_must_return_a_list(value: Any) -> None:
    def scalar(completions, **kwargs):
        return value

    with pytest.raises(RewardError, match=r"scalar .trl style. returned .* return a list"):
        scores(scalar)


def test_nan_in_a_trl_list_names_the_sample() -> None:
    def bad(completions, **kwargs):
        return [0.0, math.nan, 0.0]

    with pytest.raises(RewardError, match="bad returned nan on prompt 0-7 sample 1"):
        scores(bad)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_is_chained_and_names_function_and_sample(asynchronous: bool) -> None:
    def broken(completion: str, answer: str) -> float:
        return 1 / (len(answer) - len(completion) + (answer == "4"))

    async def broken_async(completion: str, answer: str) -> float:
        return broken(completion, answer)

    with pytest.raises(RewardError, match=r"reward broken.* raised ZeroDivisionError on prompt 0-3 sample 0") as caught:
        scores(broken_async if asynchronous else broken)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_text_read_as_messages_says_which_style_was_used() -> None:
    def turns_elsewhere(completion):
        return _content_of(completion)

    with pytest.raises(RewardError, match=r"TypeError.*called in posttrain style; @reward\(style=…\)"):
        scores(turns_elsewhere, chat_groups())
    assert scores(reward(style="verifiers")(turns_elsewhere), chat_groups()) == [1.0, 2.0]


def _content_of(completion: Any) -> float:
    return float(len(completion[-1]["content"]))


def test_check_refuses_missing_columns_before_anything_runs() -> None:
    def correct(completion: str, solution: str) -> float:
        raise AssertionError("never called")

    with pytest.raises(RewardError, match=r"correct .posttrain style. asks for solution.*columns: answer, level"):
        Rubric([correct]).check(["level", "answer"])
    Rubric([correct]).check(["solution"])


def test_a_column_named_like_something_the_loop_provides_is_refused_where_it_is_asked_for() -> None:
    def by_step(completion: str, step: int) -> float:
        return float(step)

    def by_column(completion: str, columns) -> float:
        return float(columns["step"])

    with pytest.raises(RewardError, match=r"by_step .* asks for step, which is both a column"):
        Rubric([by_step]).check(["step", "answer"])
    Rubric([by_step]).check(["answer"])
    rubric = Rubric([by_column])
    rubric.check(["step"])
    assert run(rubric, [(Prompt("0-0", "x", {"step": 5}), [sample("a")])], 9)[0].rollouts[0].reward == 5.0


def test_a_row_without_the_column_is_an_error_and_a_default_is_used() -> None:
    def needs(completion: str, answer: str) -> float:
        return 1.0

    def may(completion: str, answer: str = "?") -> float:
        return float(answer == "?")

    groups: Groups = [(Prompt("0-1", "x", {}), [sample("a")])]
    with pytest.raises(RewardError, match="needs asks for answer, which prompt 0-1 sample 0 does not have"):
        scores(needs, groups)
    assert scores(may, groups) == [1.0]


@pytest.mark.parametrize("name", ["a/b", "", " a"])
def test_names_that_break_metric_keys_are_refused(name: str) -> None:
    def own(completion: str) -> float:
        return 0.0

    with pytest.raises(RewardError, match="it becomes the metric"):
        Rubric([reward(name=name)(own)])


def test_two_rewards_of_one_name_and_none_at_all_are_refused() -> None:
    def own(completion: str) -> float:
        return 0.0

    with pytest.raises(RewardError, match="two rewards are called own"):
        Rubric([own, functools.partial(own)])
    with pytest.raises(RewardError, match="at least one"):
        Rubric([])


def test_metrics_leave_out_what_does_not_apply() -> None:
    @reward(weight=2.0)
    def sometimes(completion: str, level: int) -> float | None:
        return float(completion) if level == 1 else None

    def never(completion: str) -> None:
        return None

    rubric = Rubric([sometimes, never])
    groups = run(rubric, text_groups())
    figures = values(rubric.metrics(groups))
    # scores 4, 5, None: totals 8, 10, 0
    assert figures == pytest.approx(
        {
            "reward/mean": 6.0,
            "reward/std": math.sqrt((2**2 + 4**2 + 6**2) / 2),
            "reward/unscored": 1 / 3,
            "reward/sometimes/mean": 4.5,
            "reward/sometimes/std": math.sqrt(0.5),
            "reward/sometimes/max": 5.0,
            "reward/sometimes/applies": 2 / 3,
            "reward/never/applies": 0.0,
        }
    )
    assert groups[1].rollouts[0].reward == 0.0


def test_metrics_of_parts_merge_to_those_of_the_whole() -> None:
    def number(completion: str) -> float:
        return float(completion)

    rubric = Rubric([number])
    groups = run(rubric, text_groups())
    apart = merge(rubric.metrics([group]) for group in groups)
    assert values(apart) == pytest.approx(values(rubric.metrics(groups)))


def test_no_samples_give_empty_groups() -> None:
    def own(completion: str) -> float:
        raise AssertionError("never called")

    prompt = Prompt("0-0", "x")
    assert run(Rubric([own]), [(prompt, [])]) == [RolloutGroup(prompt, [])]
    assert run(Rubric([own]), []) == []


async def test_a_blocking_function_does_not_block_the_loop() -> None:
    released = threading.Event()

    def waits(completion: str) -> float:
        assert released.wait(10), "the event loop never came round"
        return 1.0

    scoring = asyncio.create_task(Rubric([waits]).score(text_groups()))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(released.set)
    assert [r.reward for group in await scoring for r in group.rollouts] == [1.0, 1.0, 1.0]


async def test_asynchronous_calls_run_together() -> None:
    waiting = 0
    everyone = asyncio.Event()

    async def together(completion: str) -> float:
        nonlocal waiting
        waiting += 1
        if waiting == 3:
            everyone.set()
        await asyncio.wait_for(everyone.wait(), 10)  # one after another would never get here
        return 1.0

    result = await Rubric([together]).score(text_groups())
    assert [r.reward for group in result for r in group.rollouts] == [1.0, 1.0, 1.0]


async def test_synchronous_functions_run_one_at_a_time_outside_the_loops_thread() -> None:
    threads: set[int] = set()
    inside = 0

    def first(completion: str) -> float:
        nonlocal inside
        inside += 1
        threads.add(threading.get_ident())
        assert inside == 1
        inside -= 1
        return 0.0

    def second(completion: str) -> float:
        return first(completion)

    await Rubric([first, second]).score(text_groups())
    assert len(threads) == 1 and threading.get_ident() not in threads


@reward(weight=[(0, 0.0), (10, 2.0)], requires=["short"])
def long_enough(completion: str) -> float:
    return float(len(completion))


@reward(clip=(-1.0, 1.0))
def short(completion: str) -> float:
    return 4.0 - len(completion)


@metric
def letters(completion: str) -> float:
    return float(completion.count("a"))


def test_clipping_gating_and_the_steps_weight_make_the_reward() -> None:
    """Lengths 2, 3, 4, 6: short scores 2, 1, 0, -2, counts 1, 1, 0, -1; the length counts where that is above 0."""
    group = [(Prompt("0-0", "x"), [sample(text) for text in ("aa", "aaa", "aaaa", "aaaaaa")])]
    rubric = Rubric([long_enough, short, letters])
    [scored] = run(rubric, group, step=5)
    assert [r.rewards for r in scored.rollouts][::3] == [
        {"long_enough": 2.0, "short": 2.0, "letters": 2.0},
        {"long_enough": 6.0, "short": -2.0, "letters": 6.0},
    ]
    assert [dict(r.counted) for r in scored.rollouts] == [
        {"long_enough": 2.0, "short": 1.0},
        {"long_enough": 3.0, "short": 1.0},
        {"long_enough": 0.0, "short": 0.0},
        {"long_enough": 0.0, "short": -1.0},
    ]
    assert {tuple(r.weights.items()) for r in scored.rollouts} == {(("long_enough", 1.0), ("short", 1.0))}
    assert [r.reward for r in scored.rollouts] == [3.0, 4.0, 0.0, -1.0]
    [last] = run(rubric, group, step=99)
    assert [r.reward for r in last.rollouts] == [5.0, 7.0, 0.0, -1.0]

    figures = values(rubric.metrics([scored]))
    assert figures["reward/mean"] == 1.5
    assert (figures["reward/long_enough/mean"], figures["reward/long_enough/counted"]) == (3.75, 1.25)
    assert (figures["reward/short/mean"], figures["reward/short/counted"]) == (0.25, 0.25)
    assert (figures["reward/short/max"], figures["reward/long_enough/weight"]) == (2.0, 1.0)
    assert figures["reward/letters/mean"] == 3.75
    absent = {"reward/short/weight", "reward/letters/weight", "reward/letters/counted"}
    assert not absent & figures.keys()


def test_a_completion_that_only_a_metric_scores_is_unscored() -> None:
    def never(completion: str) -> None:
        return None

    rubric = Rubric([never, letters])
    groups = run(rubric, text_groups())
    assert {r.reward for group in groups for r in group.rollouts} == {0.0}
    assert values(rubric.metrics(groups))["reward/unscored"] == 1.0


def test_a_required_reward_that_failed_does_not_pass() -> None:
    @reward(on_error="skip")
    def gate(completion: str) -> float:
        return {"4": 1.0}[completion]

    @reward(requires=["gate"])
    def gated(completion: str) -> float:
        return 1.0

    rollouts = [r for group in run(Rubric([gated, gate]), text_groups()) for r in group.rollouts]
    assert [(r.reward, r.counted["gated"], dict(r.failures)) for r in rollouts] == [
        (2.0, 1.0, {}),
        (0.0, 0.0, {"gate": "error"}),
        (0.0, 0.0, {"gate": "error"}),
    ]


def test_a_gate_that_is_no_reward_is_refused_before_anything_runs() -> None:
    with pytest.raises(RewardError, match="reward long_enough requires short, but the rewards are long_enough"):
        Rubric([long_enough])
