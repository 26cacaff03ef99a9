"""What functions written for verifiers read beside prompt and completion: ``state``, ``info``, the task and the trace.

Up to 0.1 a function gets ``state``, a dict; since 0.2 it gets ``trace``, an object. Both are made once a sample and
shared by its functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards.sample import Sample, prompt_turns, reply, turn_text
from posttrain.rl.types import Message


class TaskData(dict[str, Any]):
    """A dataset row: ``task["answer"]`` as up to 0.1, ``task.answer`` as since 0.2."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the row has no {name} (it has {', '.join(self) or 'no columns'})") from None

    @property
    def prompt_text(self) -> str:
        """The texts of the prompt's messages, with empty lines between."""
        prompt = self["prompt"]
        return prompt if isinstance(prompt, str) else "\n\n".join(filter(None, map(turn_text, prompt)))


class Task:
    """verifiers' ``self`` in a method of a task, and ``trace.task``: the row is its ``data``."""

    def __init__(self, data: TaskData) -> None:
        self.data = data


class Trace:
    """One conversation of one prompt and one reply, under the names that verifiers 0.4 gives its parts."""

    num_turns = 1
    num_branches = 1
    is_completed = True
    ok = True
    has_error = False
    stop_condition = None
    last_error = None

    def __init__(self, sample: Sample) -> None:
        self.task = Task(task_data(sample))
        self.messages: list[Message] = prompt_turns(sample.prompt) + reply(sample.completion)
        self.info: dict[str, Any] = {}
        """Room for what one function leaves to another."""
        self.tool_messages: list[Message] = []
        self.is_truncated = sample.completion.finish_reason == "length"
        self.num_input_tokens = len(sample.prompt.prompt_ids)
        self.num_output_tokens = len(sample.completion.completion_ids)

    @property
    def num_total_tokens(self) -> int:
        """Tokens of the prompt and of the reply."""
        return self.num_input_tokens + self.num_output_tokens

    @property
    def last_message(self) -> Message:
        """The reply."""
        return self.messages[-1]

    @property
    def assistant_messages(self) -> list[Message]:
        """What the model said: the reply, not the assistant turns of the prompt."""
        return self.messages[-1:]

    @property
    def last_reply(self) -> str:
        """The reply's text."""
        return turn_text(self.messages[-1]).strip()

    @property
    def transcript(self) -> str:
        """Every message with its role in brackets above it."""
        return "\n\n".join(f"[{turn['role']}]\n{turn_text(turn)}" for turn in self.messages)


def task_data(sample: Sample) -> TaskData:
    """The row with its prompt."""
    source = sample.prompt.source
    prompt = source if isinstance(source, str) else prompt_turns(sample.prompt)
    return TaskData({**sample.prompt.columns, "prompt": prompt})


def trace(sample: Sample) -> Trace:
    """The sample's trace, made when first asked for."""
    if "trace" not in sample.shared:
        sample.shared["trace"] = Trace(sample)
    found: Trace = sample.shared["trace"]
    return found


def state(sample: Sample) -> dict[str, Any]:
    """The sample's state, made when first asked for: the columns, and the rollout as verifiers describes it."""
    if "state" not in sample.shared:
        prompt, completion = prompt_turns(sample.prompt), reply(sample.completion)
        truncated = sample.completion.finish_reason == "length"
        sample.shared["state"] = {
            **sample.prompt.columns,
            "prompt": prompt,
            "completion": completion,
            "info": info(sample),
            "task": task_name(sample),
            "is_completed": True,
            "is_truncated": truncated,
            "stop_condition": None,
            "trajectory": [{"prompt": prompt, "completion": completion, "is_truncated": truncated}],
        }
    found: dict[str, Any] = sample.shared["state"]
    return found


def info(sample: Sample) -> dict[str, Any]:
    """The column of that name, a dict or one written as JSON; nothing where there is none."""
    found = sample.prompt.columns.get("info")
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except json.JSONDecodeError as error:
            raise RewardError(f"{sample.label}: column info is text but no JSON ({error})") from None
    if found is not None and not isinstance(found, Mapping):
        raise RewardError(f"{sample.label}: column info is {type(found).__name__}, verifiers wants a dict")
    return dict(found or {})


def task_name(sample: Sample) -> Any:
    """The column ``task``; verifiers' own word where there is none."""
    return sample.prompt.columns.get("task") or "default"
