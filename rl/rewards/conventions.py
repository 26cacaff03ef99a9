"""What each calling convention hands a function by name, how dataset columns reach it, what it may return.

Read from the code that calls the functions: TRL 1.16, verifiers 0.1.3 to 0.4.0, verl 0.9.1, OpenRLHF 0.11.2, AReaL
1.0.4. Nothing is computed that a function does not ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from posttrain.rl.rewards import verifiers_objects as verifiers
from posttrain.rl.rewards.decorator import Style
from posttrain.rl.rewards.sample import Sample, prompt_text, prompt_turns, reply
from posttrain.rl.types import Message

Maker = Callable[[Sequence[Sample], bool | None], Any]
"""Makes an argument for one call: its samples, and whether the parameter wants messages (``None``: not said)."""


@dataclass(slots=True, frozen=True)
class Convention:
    """One form of a calling convention."""

    style: Style
    makers: Mapping[str, Maker]
    """Names that are always there."""
    batched: bool = False
    """Called once for many samples, with a list for each name."""
    one_group: bool = False
    """The samples of a call must be completions of one prompt, whose columns are then handed over as they are."""
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names that stand for a column: where to look, in this order; ``a.b`` is a key of a column that holds a dict."""
    all_columns: bool = True
    """Columns also reach ``**kwargs`` and parameters with a default."""
    unwrap: Callable[[Any], Any] = lambda value: value
    """From what stands for one score to the number."""
    unwrap_all: Callable[[Any], Any] = lambda value: value
    """From what a call for many samples returns to the list."""

    def places(self, name: str) -> tuple[str, ...]:
        """Columns that a name may be filled from."""
        return self.columns.get(name, (name,))


def form(style: Style, names: Collection[str]) -> Convention:
    """The form of ``style`` that a function with these parameters follows."""
    asked = set(names)
    if style == "verl" and asked & {*VERL_BATCH.makers, *VERL_BATCH.columns}:
        return VERL_BATCH
    if style == "verifiers":
        if "traces" in asked:
            return VERIFIERS_TRACES
        if asked & VERIFIERS_PLURAL:
            return VERIFIERS_TASKS if asked == {"tasks", "states"} else VERIFIERS_GROUP
        return VERIFIERS_TASK if asked & {"trace", "self"} or asked == {"task", "state"} else VERIFIERS
    return _FORMS[style]


def _one(make: Callable[[Sample, bool | None], Any]) -> Maker:
    return lambda samples, wants: make(samples[0], wants)


def _each(make: Callable[[Sample, bool | None], Any]) -> Maker:
    return lambda samples, wants: [make(sample, wants) for sample in samples]


def _row_prompt(sample: Sample, wants: bool | None) -> str | list[Message]:
    """As wanted; else as the row is."""
    return prompt_turns(sample.prompt) if (sample.is_chat if wants is None else wants) else prompt_text(sample.prompt)


def _own_prompt(sample: Sample, wants: bool | None) -> str | list[Message]:
    """As wanted; else what the row itself holds."""
    if wants is not None:
        return _row_prompt(sample, wants)
    source = sample.prompt.source
    return source if isinstance(source, str) else list(source)


def _row_completion(sample: Sample, wants: bool | None) -> str | list[Message]:
    """As wanted; else messages where the row holds messages."""
    return reply(sample.completion) if (sample.is_chat if wants is None else wants) else sample.completion.text


def _own_completion(sample: Sample, wants: bool | None) -> str | list[Message]:
    return reply(sample.completion) if wants else sample.completion.text


def _completion_ids(sample: Sample, wants: bool | None) -> list[int]:
    return list(sample.completion.completion_ids)


def _text(sample: Sample, wants: bool | None) -> str:
    return sample.completion.text


def _prompt_text(sample: Sample, wants: bool | None) -> str:
    return prompt_text(sample.prompt)


def _extra_info(sample: Sample, wants: bool | None) -> dict[str, Any]:
    return dict(sample.prompt.columns.get("extra_info") or {})


def _score_of(value: Any) -> Any:
    """verl: a number, or a dict with ``score`` and other numbers."""
    return value["score"] if isinstance(value, Mapping) and "score" in value else value


def _rewards_of(value: Any) -> Any:
    """OpenRLHF: a tensor or list, or a dict with ``rewards`` (``scores`` serves its dynamic filtering)."""
    if not isinstance(value, Mapping):
        return value
    return value["rewards"] if value.get("rewards") is not None else value.get("scores", value)


def _sum_of(value: Any) -> Any:
    """verifiers since 0.2: a number, or several by name, which count with the same weight."""
    if not isinstance(value, Mapping) or not value:
        return value
    numbers = [one.item() if hasattr(one, "item") else one for one in value.values()]
    return sum(numbers) if all(isinstance(one, int | float) for one in numbers) else value


POSTTRAIN = Convention(
    "posttrain",
    {
        "prompt": _one(_own_prompt),
        "completion": _one(_own_completion),
        "completion_ids": _one(_completion_ids),
        "finish_reason": _one(lambda sample, wants: sample.completion.finish_reason),
        "messages": _one(lambda sample, wants: prompt_turns(sample.prompt) + reply(sample.completion)),
        "columns": _one(lambda sample, wants: sample.prompt.columns),
        "prompt_id": _one(lambda sample, wants: sample.prompt.id),
        "step": _one(lambda sample, wants: sample.step),
    },
)
GROUP = Convention(
    "group",
    {
        "prompt": _one(_own_prompt),
        "completions": _each(_own_completion),
        "completion_ids": _each(_completion_ids),
        "finish_reasons": _each(lambda sample, wants: sample.completion.finish_reason),
        **{name: POSTTRAIN.makers[name] for name in ("columns", "prompt_id", "step")},
    },
    batched=True,
    one_group=True,
)
TRL = Convention(
    "trl",
    {
        "prompts": _each(_row_prompt),
        "completions": _each(_row_completion),
        "completion_ids": _each(_completion_ids),
        "trainer_state": lambda samples, wants: SimpleNamespace(global_step=samples[0].step),
    },
    batched=True,
)
"""Its ``log_extra``, ``log_metric`` and ``environments`` are left at their defaults."""
VERIFIERS = Convention(
    "verifiers",
    {
        "prompt": _one(_row_prompt),
        "completion": _one(_row_completion),
        "state": _one(lambda sample, wants: verifiers.state(sample)),
        "info": _one(lambda sample, wants: verifiers.info(sample)),
        "task": _one(lambda sample, wants: verifiers.task_name(sample)),
    },
)
VERIFIERS_GROUP = Convention(
    "verifiers",
    {
        "prompts": _each(_row_prompt),
        "completions": _each(_row_completion),
        "states": _each(lambda sample, wants: verifiers.state(sample)),
        "infos": _each(lambda sample, wants: verifiers.info(sample)),
        "tasks": _each(lambda sample, wants: verifiers.task_name(sample)),
    },
    batched=True,
    columns={"answers": ("answers", "answer")},
)
VERIFIERS_PLURAL = {*VERIFIERS_GROUP.makers, *VERIFIERS_GROUP.columns}
VERIFIERS_TASK = Convention(
    "verifiers",
    {
        "task": _one(lambda sample, wants: verifiers.task_data(sample)),
        "state": _one(lambda sample, wants: verifiers.state(sample)),
        "trace": _one(lambda sample, wants: verifiers.trace(sample)),
        "self": _one(lambda sample, wants: verifiers.trace(sample).task),
    },
    all_columns=False,
    unwrap=_sum_of,
)
"""Since 0.2; before that with ``task, state`` alone, when the task is the row too."""
VERIFIERS_TASKS = Convention(
    "verifiers",
    {
        "tasks": _each(lambda sample, wants: verifiers.task_data(sample)),
        "states": _each(lambda sample, wants: verifiers.state(sample)),
    },
    batched=True,
)
VERIFIERS_TRACES = Convention(
    "verifiers",
    {
        "task": VERIFIERS_TASK.makers["task"],
        "traces": _each(lambda sample, wants: verifiers.trace(sample)),
        "self": VERIFIERS_TASK.makers["self"],
    },
    batched=True,
    one_group=True,
    all_columns=False,
)
VERL = Convention(
    "verl",
    {"solution_str": _one(_text), "extra_info": _one(_extra_info)},
    columns={
        "data_source": ("data_source",),
        "ground_truth": ("reward_model.ground_truth", "ground_truth", "answer"),
    },
    all_columns=False,
    unwrap=_score_of,
)
VERL_BATCH = Convention(
    "verl",
    {"solution_strs": _each(_text), "extra_infos": _each(_extra_info)},
    batched=True,
    columns={
        "data_sources": VERL.columns["data_source"],
        "ground_truths": VERL.columns["ground_truth"],
    },
    all_columns=False,
    unwrap=_score_of,
)
OPENRLHF = Convention(
    "openrlhf",
    {
        "queries": _each(lambda sample, wants: prompt_text(sample.prompt) + sample.completion.text),
        "prompts": _each(_prompt_text),
    },
    batched=True,
    columns={"labels": ("labels", "label", "answer", "ground_truth")},
    all_columns=False,
    unwrap_all=_rewards_of,
)
AREAL = Convention(
    "areal",
    {
        "prompt": _one(_prompt_text),
        "completions": _one(_text),
        "prompt_ids": _one(lambda sample, wants: list(sample.prompt.prompt_ids)),
        "completion_ids": _one(_completion_ids),
    },
)
_FORMS: dict[Style, Convention] = {
    "posttrain": POSTTRAIN,
    "group": GROUP,
    "trl": TRL,
    "verifiers": VERIFIERS,
    "verl": VERL,
    "openrlhf": OPENRLHF,
    "areal": AREAL,
}
