"""Signatures of verifiers 0.2 to 0.4: methods of a task, and functions a configuration plugs in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.rl.rewards import metric, reward
from tests.rl.rewards.conventions.case import CHAT, TEXT, Case

if TYPE_CHECKING:
    import verifiers.v1 as vf


class ArithmeticTask:
    """Methods as in a ``vf.Task``; without the library the class is a plain one."""

    @reward(weight=1.0)
    async def correct(self, trace: vf.Trace) -> float:
        """The row is ``self.data``."""
        return float(trace.last_reply == self.data.answer)

    @metric
    async def length(self, trace: vf.Trace) -> float:
        """Recorded only."""
        return float(trace.num_output_tokens)

    @reward
    async def concise(self, traces: list[vf.Trace]) -> list[float]:
        """0.2's ``group_reward``."""
        lengths = [len(trace.last_reply) for trace in traces]
        return [float(length == min(lengths)) for length in lengths]


@reward
async def asked_and_answered(task, trace) -> float:
    """A plugged function: the row as ``task``."""
    assert task.prompt_text.endswith("What is 6 times 7?")
    return float(task.answer in trace.transcript)


@reward
async def parts(trace: vf.Trace, runtime: vf.Runtime | None = None) -> dict[str, float]:
    """Several scores by name add up; a runtime there is not."""
    assert runtime is None
    reply = trace.assistant_messages[-1]
    return {"digits": float(reply.content.isdigit()), "calls": float(len(reply.tool_calls or []))}


@reward
async def unfinished(trace) -> float:
    """Flags of the rollout, and the row by way of the trace."""
    assert trace.task.data.answer == "42" and trace.num_turns == 1
    return -1.0 if trace.is_truncated else trace.messages[-1].role == "assistant"


ROW = {"answer": "42"}
THREE = ("42", "43", "It is 42.")
CASES = [
    Case(ArithmeticTask.correct, "verifiers", THREE, [1.0, 0.0, 0.0], ROW, CHAT),
    Case(ArithmeticTask.correct, "verifiers", THREE, [1.0, 0.0, 0.0], ROW, TEXT),
    Case(ArithmeticTask.length, "verifiers", THREE, [2.0, 2.0, 9.0], ROW, CHAT),
    Case(ArithmeticTask.concise, "verifiers", THREE, [1.0, 1.0, 0.0], ROW, CHAT),
    Case(asked_and_answered, "verifiers", THREE, [1.0, 0.0, 1.0], ROW, CHAT),
    Case(asked_and_answered, "verifiers", THREE, [1.0, 0.0, 1.0], ROW, TEXT),
    Case(parts, "verifiers", THREE, [1.0, 1.0, 0.0], ROW, CHAT),
    Case(unfinished, "verifiers", THREE, [1.0, 1.0, 1.0], ROW, CHAT),
]
