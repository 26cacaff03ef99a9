"""What a step cost and what it brought, for its line of metrics."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.rl.timeline import Window

ALWAYS = ("wake", "sleep", "train", "publish")
"""Phases with a figure in every line, be it 0."""


def performance(
    values: Mapping[str, float], window: Window, memory: Mapping[str, float], group_size: int
) -> dict[str, float]:
    """Throughput, memory and the seconds of each phase; an evaluation does not count against throughput.

    ``rollout`` and ``reward`` are left to the batch: where generation runs ahead, the window holds those of another.
    """
    phases = dict.fromkeys(ALWAYS, 0.0) | window.phases()
    seconds = window.seconds - phases.get("evaluate", 0.0)
    samples = values.get("rollout/groups", 0.0) * group_size
    return {
        "perf/tokens_per_second": samples * values.get("rollout/completion_tokens", 0.0) / seconds,
        "perf/samples_per_second": samples / seconds,
        **{f"perf/{key}": figure for key, figure in memory.items()},
        "time/step_s": window.seconds,
        "time/idle_s": window.idle(),
        **{f"time/{name}_s": spent for name, spent in phases.items() if name not in ("rollout", "reward")},
    }
