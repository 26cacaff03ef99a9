"""Styles chosen from signatures: forms of our own, TRL's and verifiers' documentation, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards import reward
from posttrain.rl.rewards.arguments import call_arguments
from posttrain.rl.rewards.decorator import STYLES
from posttrain.rl.rewards.sample import Sample
from posttrain.rl.rewards.signature import read
from posttrain.rl.types import Completion, Prompt

Messages = list[dict[str, str]]
State = dict[str, Any]
Trace = Any


# ours
def ours_annotated(completion: str, answer: str) -> float: ...
def ours_bare(completion, answer): ...
def ours_prompt(prompt, completion, level=3): ...
def ours_ids(completion_ids: list[int]) -> float: ...
def ours_finish(finish_reason): ...
def ours_everything(completion: str, **kwargs) -> float: ...
def ours_column_only(answer): ...
async def ours_async(completion: str) -> float: ...
def ours_state_column(completion: str, state: str) -> float: ...
def ours_trace_column(completion, trace): ...
def ours_info(completion, info):
    return float(info["content"] in completion)


# TRL
def trl_plain(completions, **kwargs): ...
def trl_columns(prompts, completions, ground_truth): ...
def trl_annotated(completions: list[list[dict[str, str]]], solution: list[str], **kwargs) -> list[float | None]: ...
def trl_ids(completion_ids, **kwargs): ...
def trl_ids_annotated(completion_ids: list[list[int]], **kwargs) -> list[float]: ...
def trl_only_columns(answer, **kwargs) -> list[float]: ...
async def trl_async(prompts, completions, **kwargs): ...


def trl_strings(prompts, completions: list[str], queries, **kwargs): ...
def trl_trace_column(completions, trace, **kwargs): ...


# verifiers
def vf_annotated(completion: Messages, answer: str) -> float: ...
def vf_typed(prompt: list[dict], completion: list[dict], answer, state) -> float: ...
def vf_state(completion, answer, state): ...
def vf_only_state(state): ...
def vf_parser(parser, completion, answer): ...
def vf_group(completions, states): ...
def vf_group_kwargs(completions, states: list[State], **kwargs): ...
def vf_rows(task, state): ...
def vf_trace(trace, task): ...
def vf_method(self, trace: Trace, runtime=None): ...
def vf_traces(self, traces): ...
async def vf_indexed(completion, answer) -> float:
    response = completion[-1]["content"]
    return 1.0 if answer in response else 0.0


def vf_loop(completion, **kwargs):
    return float(sum(turn["role"] == "assistant" for turn in completion))


def vf_get(completion):
    last = completion[-1]
    return float(len(last.get("content") or ""))


# verl, OpenRLHF, AReaL
def verl_score(data_source, solution_str, ground_truth, extra_info=None): ...
def verl_short(solution_str, ground_truth) -> float: ...
def verl_batch(data_sources, solution_strs, ground_truths, extra_infos): ...
def openrlhf_function(queries, prompts, labels): ...
async def openrlhf_async(queries, prompts, labels, **kwargs): ...
def areal_bare(prompt, completions, prompt_ids, completion_ids, answer, **kwargs): ...
def areal_annotated(prompt: str, completions: str, prompt_ids: list[int], completion_ids: list[int], **data): ...
def areal_without_prompt(completions, prompt_ids, answer): ...
def areal_short(completions: str, answer: str) -> float: ...


def _required_runtime(trace, runtime): ...


class Grader:
    """A callable object and a bound method."""

    def __call__(self, completion: str, answer: str) -> float:
        return float(completion == answer)

    def batch(self, completions, **kwargs):
        return [0.0 for _ in completions]

    async def chat(self, completion: Messages) -> float:
        return float(len(completion))


@pytest.mark.parametrize(
    ("function", "style"),
    [
        *[
            (function, "posttrain")
            for function in (
                ours_annotated, ours_bare, ours_prompt, ours_ids, ours_finish, ours_everything, ours_column_only,
                ours_async, ours_state_column, ours_info, ours_trace_column, Grader(),
                functools.partial(ours_annotated, answer="4"),
            )
        ],
        *[
            (function, "trl")
            for function in (
                trl_plain, trl_columns, trl_annotated, trl_ids, trl_ids_annotated, trl_only_columns, trl_async,
                trl_strings, trl_trace_column,
                Grader().batch, functools.partial(trl_columns, ground_truth=["4"]),
            )
        ],
        *[
            (function, "verifiers")
            for function in (
                vf_annotated, vf_typed, vf_state, vf_indexed, vf_loop, vf_get, Grader().chat,
                functools.partial(vf_typed, answer="4"), vf_only_state, vf_parser, vf_group, vf_group_kwargs, vf_rows,
                vf_trace, vf_method, vf_traces,
            )
        ],
        *[(function, "verl") for function in (verl_score, verl_short, verl_batch)],
        *[(function, "openrlhf") for function in (openrlhf_function, openrlhf_async)],
        *[(function, "areal") for function in (areal_bare, areal_annotated, areal_without_prompt, areal_short)],
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)  # fmt: skip
def test_style_is_read_from_the_signature(function: Callable[..., Any], style: str) -> None:
    assert read(function).style == style


@pytest.mark.parametrize("style", STYLES)
def test_explicit_style_wins(style: Any) -> None:
    def ambiguous(completion, **kwargs): ...

    assert read(reward(style=style)(ambiguous)).style == style


def _both(prompts, completion): ...
def _only_kwargs(**kwargs): ...
def _columns_and_kwargs(answer, **kwargs): ...
def _nothing(): ...
def _list_of_one(completion: str) -> list[float]: ...
def _positional(completion, /): ...
def _one_or_all(prompt, completions, answer): ...
def _all_of_a_group(prompt, completions: list[str], prompt_ids): ...
def _areal_list(completions: str, prompt_ids) -> list[float]: ...
def _verl_and_ours(solution_str, completion): ...
def _verl_and_openrlhf(solution_str, queries): ...
def _verl_list(solution_str, ground_truth) -> list[float]: ...
def _answers_and_kwargs(completions, answers, **kwargs): ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_both, "prompts.*completion.*keep one"),
        (_only_kwargs, r"only \*\*kwargs"),
        (_columns_and_kwargs, "one sample or a batch"),
        (_nothing, "takes no arguments"),
        (_list_of_one, "returns a list"),
        (_positional, "positional-only"),
        (_one_or_all, "completions.*prompt .*style group, one text in style areal"),
        (_all_of_a_group, "style group, one text in style areal"),
        (_areal_list, "returns a list but asks for completions and prompt_ids .areal style, once a sample"),
        (_verl_and_ours, r"solution_str \(verl\) and completion \(posttrain\)"),
        (_verl_and_openrlhf, r"solution_str \(verl\) and queries \(openrlhf\)"),
        (_verl_list, "returns a list but asks for solution_str"),
        (_answers_and_kwargs, "answers beside .*column in TRL.*own in verifiers"),
        ("math", "a reward is a function"),
    ],
)
def test_signature_that_fits_no_style_is_refused_with_a_remedy(function: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        read(function)


@pytest.mark.parametrize(
    ("function", "is_async"),
    [
        (ours_annotated, False),
        (ours_async, True),
        (Grader(), False),
        (Grader().chat, True),
        (functools.partial(vf_indexed, answer="4"), True),
    ],
)
def test_async_is_seen_through_partials_methods_and_objects(function: Callable[..., Any], is_async: bool) -> None:
    assert read(function).is_async is is_async


def test_partial_arguments_are_no_longer_asked_for() -> None:
    signature = read(functools.partial(ours_annotated, answer="4"))
    assert signature.required == ("completion",) and signature.missing([]) == []
    assert signature.name == "ours_annotated"


def test_partial_arguments_are_not_filled_from_columns() -> None:
    def keep(completion: str, answer: str, **kwargs: Any) -> float: ...

    signature = read(functools.partial(keep, answer="4"))
    sample = Sample(Prompt("0-0", "?", {"answer": "column", "level": 1}), Completion((), (), "7", "stop", 0), 0, 0)
    assert {"answer", "completion", "level"} & set(call_arguments(signature, [sample])) == {"completion", "level"}


def test_tag_of_a_wrapped_function_counts() -> None:
    tagged = reward(weight=0.25, name="short")(functools.partial(ours_annotated, answer="4"))
    assert (read(tagged).tag.weight, read(tagged).name) == (0.25, "short")
    inner = functools.partial(reward(weight=3)(lambda completion, answer: 0.0), answer="4")
    assert read(inner).tag.weight == 3


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        (ours_annotated, ["answer"]),
        (ours_prompt, []),
        (trl_columns, ["ground_truth"]),
        (vf_state, ["answer"]),
        (ours_column_only, ["answer"]),
        (
            verl_score,
            ["data_source", "ground_truth (column reward_model.ground_truth or ground_truth or answer)"],
        ),
        (openrlhf_function, ["labels (column labels or label or answer or ground_truth)"]),
        (areal_bare, ["answer"]),
        (vf_trace, []),
        (_required_runtime, ["runtime"]),
    ],
)
def test_missing_columns_are_known_before_anything_runs(function: Callable[..., Any], missing: Sequence[str]) -> None:
    assert read(function).missing(["question"]) == missing
