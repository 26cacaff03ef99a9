"""One completion on its way to the reward functions, as text and as messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from posttrain.rl.types import Completion, Message, Prompt


class Turn(dict[str, Any]):
    """A message that can be read as ``turn["content"]`` and, as newer verifiers allow, ``turn.content``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            if name in ("tool_calls", "reasoning_content", "name"):  # verifiers' messages have them, empty
                return None
            raise AttributeError(name) from None


@dataclass(slots=True)
class Sample:
    """One completion on its way to the reward functions."""

    prompt: Prompt
    completion: Completion
    index: int
    """Place in its group."""
    step: int
    shared: dict[str, Any] = field(default_factory=dict)
    """verifiers' ``state`` and ``trace``: one of each a sample, shared by its functions."""

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
    return turn_text((users or prompt.source)[-1])


def turn_text(turn: Message) -> str:
    """A message's text: the whole of it, or of its text parts."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def reply(completion: Completion) -> list[Message]:
    """The completion as messages."""
    return [Turn(role="assistant", content=completion.text)]
