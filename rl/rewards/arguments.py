"""What each style hands a reward function for one sample, or for a batch of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards.signature import Signature
from posttrain.rl.types import Completion, Message, Prompt


class Turn(dict[str, Any]):
    """A message that can be read as ``turn["content"]`` and, as newer verifiers allow, ``turn.content``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(slots=True)
class Sample:
    """One completion on its way to the reward functions."""

    prompt: Prompt
    completion: Completion
    index: int
    """Place in its group."""
    step: int
    state: dict[str, Any] = field(default_factory=dict)
    """verifiers' ``state``: one dict a sample, shared by its functions."""

    @property
    def label(self) -> str:
        """How messages name the sample."""
        return f"prompt {self.prompt.id} sample {self.index}"

    @property
    def is_chat(self) -> bool:
        """Whether the row holds messages."""
        return not isinstance(self.prompt.source, str)


def prompt_turns(prompt: Prompt) -> list[Message]:
    """The prompt as messages; plain text is one user turn."""
    if isinstance(prompt.source, str):
        return [Turn(role="user", content=prompt.source)]
    return [Turn(turn) for turn in prompt.source]


def prompt_text(prompt: Prompt) -> str:
    """The prompt as text: plain text itself, or the last user turn."""
    if isinstance(prompt.source, str):
        return prompt.source
    users = [turn for turn in prompt.source if turn.get("role") == "user"]
    content = (users or prompt.source)[-1].get("content", "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def reply(completion: Completion) -> list[Message]:
    """The completion as messages."""
    return [Turn(role="assistant", content=completion.text)]


def sample_arguments(signature: Signature, sample: Sample) -> dict[str, Any]:
    """Keyword arguments of one call in posttrain or verifiers style."""
    columns = sample.prompt.columns
    if signature.style == "verifiers":
        offered: dict[str, Any] = _verifiers(signature, sample)
    else:
        offered = {
            "prompt": _prompt(signature, "prompt", sample, whole=True),
            "completion": _completion(signature, "completion", sample, chat=False),
            "completion_ids": list(sample.completion.completion_ids),
            "finish_reason": sample.completion.finish_reason,
            "messages": prompt_turns(sample.prompt) + reply(sample.completion),
            "columns": columns,
            "prompt_id": sample.prompt.id,
            "step": sample.step,
        }
    merged = {**columns, **offered}
    if signature.takes_all:
        return merged
    return _select(signature, merged, sample)


def batch_arguments(signature: Signature, samples: Sequence[Sample], trainer_state: object) -> dict[str, Any]:
    """Keyword arguments of one call in TRL style: everything a list over the samples."""
    keys = list(dict.fromkeys(key for sample in samples for key in sample.prompt.columns))
    offered: dict[str, Any] = {key: [sample.prompt.columns.get(key) for sample in samples] for key in keys}
    offered["prompts"] = [_prompt(signature, "prompts", sample) for sample in samples]
    offered["completions"] = [_completion(signature, "completions", sample, chat=sample.is_chat) for sample in samples]
    offered["completion_ids"] = [list(sample.completion.completion_ids) for sample in samples]
    offered["trainer_state"] = trainer_state
    if signature.takes_all:
        return offered
    return _select(signature, offered, samples[0])


def _select(signature: Signature, offered: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
    """Only what the function names; a required name that is absent is an error here too (rows may be uneven)."""
    for name in signature.required:
        if name not in offered:
            raise RewardError(
                f"reward {signature.name} asks for {name}, which {sample.label} does not have "
                f"(it has {', '.join(sample.prompt.columns) or 'no columns'}): "
                "give the argument a default or add the column"
            )
    return {name: offered[name] for name in signature.names if name in offered}


def _prompt(signature: Signature, key: str, sample: Sample, *, whole: bool = False) -> str | list[Message]:
    """As annotated or read by the body; else as the row is (``whole``: our own style keeps the row's own form)."""
    wants = signature.as_messages.get(key)
    if wants is None:
        wants = sample.is_chat
        if whole and wants:
            return list(sample.prompt.source) if not isinstance(sample.prompt.source, str) else sample.prompt.source
    return prompt_turns(sample.prompt) if wants else prompt_text(sample.prompt)


def _completion(signature: Signature, key: str, sample: Sample, *, chat: bool) -> str | list[Message]:
    wants = signature.as_messages.get(key)
    return reply(sample.completion) if (chat if wants is None else wants) else sample.completion.text


def _verifiers(signature: Signature, sample: Sample) -> dict[str, Any]:
    """prompt, completion, answer, state, info and task as verifiers' rubric hands them."""
    columns = sample.prompt.columns
    offered: dict[str, Any] = {
        "prompt": _prompt(signature, "prompt", sample),
        "completion": _completion(signature, "completion", sample, chat=sample.is_chat),
        "info": columns.get("info") or {},
        "task": columns.get("task") or "default",
    }
    if "answer" in columns:
        offered["answer"] = columns["answer"]
    if not sample.state:
        sample.state.update({**columns, **offered, "is_truncated": sample.completion.finish_reason == "length"})
    return {**offered, "state": sample.state}
