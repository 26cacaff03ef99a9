"""Functions in the signatures of other libraries, registered by the bare decorator, score as they do there."""

from __future__ import annotations

import asyncio

import pytest

from posttrain.rl.rewards import Rubric
from posttrain.rl.rewards.signature import function_name, read
from posttrain.rl.types import Completion, Prompt
from tests.rl.rewards.conventions.case import Case
from tests.rl.rewards.conventions.table import CASES, LIBRARIES


def scored(case: Case) -> list[float | None]:
    """Scores of a case's completions, as samples of one prompt at step 3."""
    rubric = Rubric([case.function])
    rubric.check(case.columns)
    ids = case.completion_ids or [range(len(text)) for text in case.completions]
    samples = [
        Completion(tuple(one), tuple(0.0 for _ in one), text, "stop", 0)
        for one, text in zip(ids, case.completions, strict=True)
    ]
    prompt = Prompt("0-0", case.prompt, dict(case.columns), prompt_ids=(11, 12))
    [group] = asyncio.run(rubric.score([(prompt, samples)], step=3))
    return [score for rollout in group.rollouts for score in rollout.rewards.values()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: function_name(case.function))
def test_function_of_another_library_scores_right(case: Case) -> None:
    signature = read(case.function)
    assert signature.tag.style is None, "the bare decorator leaves the style open"
    assert signature.style == case.style
    assert scored(case) == case.expected


def test_table_covers_every_library() -> None:
    names = {library: {function_name(case.function) for case in cases} for library, cases in LIBRARIES.items()}
    assert all(len(functions) >= 3 for functions in names.values())
    assert sum(len(functions) for functions in names.values()) >= 20
