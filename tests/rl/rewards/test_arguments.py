"""What each convention hands over: names, shapes, where columns come from, and what may be returned."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards import Rubric, reward
from posttrain.rl.rewards.arguments import call_arguments
from posttrain.rl.rewards.sample import Sample
from posttrain.rl.rewards.signature import read
from posttrain.rl.rewards.verifiers_objects import state, trace
from posttrain.rl.types import Completion, FinishReason, Prompt

CHAT = [{"role": "system", "content": "brief"}, {"role": "user", "content": "2+2="}]


def completion(text: str, finish: FinishReason = "stop") -> Completion:
    return Completion(tuple(range(len(text))), tuple(0.0 for _ in text), text, finish, 0)


def samples(*texts: str, prompt: Any = "2+2=", **columns: Any) -> list[Sample]:
    row = Prompt("0-0", prompt, columns, prompt_ids=(7, 8))
    return [Sample(row, completion(text), index, 5) for index, text in enumerate(texts)]


def scores(function: Callable[..., Any], *groups: tuple[Prompt, list[Completion]]) -> list[float | None]:
    rubric = Rubric([function])
    found = asyncio.run(rubric.score(list(groups)))
    return [next(iter(rollout.rewards.values())) for group in found for rollout in group.rollouts]


def test_group_style_gets_lists_of_completions_and_single_columns() -> None:
    @reward(style="group")
    def longest(prompt, completions: list[str], finish_reasons, completion_ids, step, answer) -> list[float]: ...

    given = samples("4", "four", answer="4")
    assert call_arguments(read(longest), given) == {
        "prompt": "2+2=",
        "completions": ["4", "four"],
        "finish_reasons": ["stop", "stop"],
        "completion_ids": [[0], [0, 1, 2, 3]],
        "step": 5,
        "answer": "4",
    }
    chat = call_arguments(read(longest), samples("4", prompt=CHAT, answer="4"))
    assert chat["prompt"] == CHAT and chat["completions"] == ["4"]


def test_group_style_is_called_once_a_prompt() -> None:
    calls = []

    @reward(style="group")
    async def share_of_longest(completions, answer):
        calls.append((answer, completions))
        return [len(text) / max(map(len, completions)) for text in completions]

    first = (Prompt("0-0", "a", {"answer": "x"}), [completion("ab"), completion("abcd")])
    second = (Prompt("0-1", "b", {"answer": "y"}), [completion("a"), completion("ab")])
    assert scores(share_of_longest, first, second) == [0.5, 1.0, 0.5, 1.0]
    assert sorted(calls) == [("x", ["ab", "abcd"]), ("y", ["a", "ab"])]


def test_kwargs_of_each_convention_hold_what_its_library_passes() -> None:
    def areal(prompt, completions, prompt_ids, **data): ...
    def trl(completions, **kwargs): ...
    def verl(solution_str, **kwargs): ...
    def openrlhf(queries, **kwargs): ...
    def verifiers(completion: list[dict], **kwargs): ...

    given = samples("4", answer="4", level=2)
    names = {function.__name__: set(call_arguments(read(function), given)) for function in (areal, trl, verl, openrlhf)}
    assert names == {
        "areal": {"prompt", "completions", "prompt_ids", "completion_ids", "answer", "level"},
        "trl": {"prompts", "completions", "completion_ids", "trainer_state", "answer", "level"},
        "verl": {"solution_str", "ground_truth", "extra_info"},
        "openrlhf": {"queries", "prompts", "labels"},
    }
    found = call_arguments(read(verifiers), given)
    assert set(found) == {"prompt", "completion", "state", "info", "task", "answer", "level"}


@pytest.mark.parametrize(
    ("columns", "truth"),
    [
        ({"reward_model": {"ground_truth": "a"}, "ground_truth": "b", "answer": "c"}, "a"),
        ({"reward_model": {"style": "model"}, "ground_truth": "b", "answer": "c"}, "b"),
        ({"reward_model": "a judge", "answer": "c"}, "c"),
        ({"ground_truth": None, "answer": "c"}, None),
    ],
)
def test_verl_ground_truth_is_found_where_verl_keeps_it_first(columns: dict[str, Any], truth: Any) -> None:
    def compute_score(solution_str, ground_truth): ...

    assert call_arguments(read(compute_score), samples("4", **columns))["ground_truth"] == truth


def test_verl_ground_truth_missing_in_one_row_names_it() -> None:
    def compute_score(solution_str, ground_truth):
        return 1.0

    with pytest.raises(RewardError, match=r"compute_score asks for ground_truth, which prompt 0-0 sample 0 does not"):
        call_arguments(read(compute_score), samples("4", reward_model={"style": "rule"}))


def test_extra_info_is_a_copy_a_sample() -> None:
    def compute_score(solution_str, extra_info): ...

    given = samples("4", "5", extra_info={"split": "train"})
    first, second = (call_arguments(read(compute_score), [one])["extra_info"] for one in given)
    first["seen"] = True
    assert second == {"split": "train"} == given[0].prompt.columns["extra_info"]
    assert call_arguments(read(compute_score), samples("4")) == {"solution_str": "4", "extra_info": {}}


def test_openrlhf_query_of_a_chat_row_starts_with_the_last_user_turn() -> None:
    def reward_func(queries, prompts, labels): ...

    assert call_arguments(read(reward_func), samples("4", "5", prompt=CHAT, label="4")) == {
        "queries": ["2+2=4", "2+2=5"],
        "prompts": ["2+2=", "2+2="],
        "labels": ["4", "4"],
    }


def test_nothing_is_computed_that_is_not_asked_for() -> None:
    class Counting:
        asked: list[str] = []  # noqa: RUF012

        def __getattr__(self, name: str) -> Any:
            Counting.asked.append(name)
            return "4" if name == "text" else ()

    def ours(completion: str): ...

    row = Prompt("0-0", "2+2=", {"answer": "4"})
    sample = Sample(row, Counting(), 0, 0)  # type: ignore[arg-type]
    assert call_arguments(read(ours), [sample]) == {"completion": "4"}
    assert Counting.asked == ["text"] and sample.shared == {}


@pytest.mark.parametrize(
    ("info", "message"), [("{'a': 1}", "info is text but no JSON"), ([1], "info is list, verifiers wants a dict")]
)
def test_info_that_is_no_dict_is_refused(info: Any, message: str) -> None:
    def uses_info(completion: list[dict], info): ...

    with pytest.raises(RewardError, match=f"prompt 0-0 sample 0: column {message}"):
        call_arguments(read(uses_info), samples("4", info=info))


def test_state_and_trace_are_shared_by_a_samples_functions_and_pickle() -> None:
    [one] = samples("4", prompt=CHAT, answer="4")
    trace(one).info["seen"] = state(one)["seen"] = True
    assert trace(one).info == {"seen": True} and state(one)["seen"]
    copy = pickle.loads(pickle.dumps(trace(one)))
    assert copy.last_reply == "4" and copy.task.data.answer == "4" and copy.messages[0].content == "brief"
    with pytest.raises(AttributeError, match="the row has no solution"):
        copy.task.data.solution  # noqa: B018


def test_trace_describes_the_rollout() -> None:
    row = Prompt("0-0", CHAT, {"answer": "4"}, prompt_ids=(1, 2, 3))
    cut = trace(Sample(row, completion(" 4 ", "length"), 0, 0))
    assert (cut.num_input_tokens, cut.num_output_tokens, cut.num_total_tokens) == (3, 3, 6)
    assert cut.is_truncated and cut.last_reply == "4" and cut.last_message["content"] == " 4 "
    assert cut.transcript == "[system]\nbrief\n\n[user]\n2+2=\n\n[assistant]\n 4 "
    assert cut.task.data.prompt_text == "brief\n\n2+2="
    assert state(Sample(row, completion("4", "length"), 0, 0))["is_truncated"]


def _returning(style: str, value: Any) -> Callable[..., Any]:
    def verl(solution_str):
        return value

    def openrlhf(queries):
        return value

    def areal(completions: str):
        return value

    def verifiers(trace):
        return value

    return {"verl": verl, "openrlhf": openrlhf, "areal": areal, "verifiers": verifiers}[style]


@pytest.mark.parametrize(
    ("style", "value", "score"),
    [
        ("verl", {"score": np.float32(0.5), "acc": True}, 0.5),
        ("verl", np.bool_(True), 1.0),
        ("openrlhf", torch.tensor([0.25]), 0.25),
        ("openrlhf", torch.tensor([[0.25]]), 0.25),
        ("openrlhf", {"rewards": [1.0], "scores": [0.0]}, 1.0),
        ("openrlhf", {"rewards": None, "scores": torch.tensor([0.0])}, 0.0),
        ("areal", torch.tensor(2), 2.0),
        ("verifiers", {"right": 1, "short": np.float64(0.5)}, 1.5),
        ("verifiers", None, None),
    ],
)
def test_returns_that_a_convention_documents(style: str, value: Any, score: float | None) -> None:
    assert scores(_returning(style, value), (Prompt("0-0", "2+2="), [completion("4")])) == [score]


@pytest.mark.parametrize(
    ("style", "value", "message"),
    [
        ("verl", {"acc": 1.0}, "returned dict"),
        ("verl", {"score": float("nan")}, "returned nan"),
        ("verl", [1.0], "returned list"),
        ("openrlhf", {"extra_logs": {}}, "openrlhf style. returned dict"),
        ("openrlhf", torch.tensor(1.0), "openrlhf style. returned Tensor"),
        ("openrlhf", {1.0}, "openrlhf style. returned set"),
        ("openrlhf", [1.0, 2.0], "returned 2 scores for 1 samples"),
        ("areal", {"score": 1.0}, "returned dict"),
        ("verifiers", {"right": "yes"}, "returned dict"),
        ("verifiers", {}, "returned dict"),
    ],
)
def test_returns_that_no_convention_documents_are_errors(style: str, value: Any, message: str) -> None:
    with pytest.raises(RewardError, match=f"reward {style}.*{message}"):
        scores(_returning(style, value), (Prompt("0-0", "2+2="), [completion("4")]))


def test_one_number_for_a_batch_points_to_areal() -> None:
    def looks_like_trl(completions, answer):
        return float(answer in completions)

    with pytest.raises(RewardError, match=r'returned float 0.0 for 1 samples.*style="areal"'):
        scores(looks_like_trl, (Prompt("0-0", "2+2=", {"answer": "4"}), [completion("4")]))
    right = reward(style="areal")(looks_like_trl)
    assert scores(right, (Prompt("0-0", "2+2=", {"answer": "4"}), [completion("4")])) == [1.0]
