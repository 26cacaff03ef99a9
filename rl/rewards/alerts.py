"""Signs that rewards have stopped teaching, or teach something else than they mean. Read off the figures of steps, so
that a resumed run knows from its own metrics what it knew before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

Figures = Mapping[str, float | None]
"""One step's line of metrics; what could not be measured is ``None`` or NaN."""

WINDOW = 20
"""Steps that are looked at."""
TIED_STEPS = 5
TIED_SHARE = 0.9
SATURATED_SHARE = 0.98
SATURATED_STD = 0.01
"""Of the largest score seen."""
CORRELATION = 0.7
FAILED_SHARE = 0.05

KINDS = ("saturated", "tied_groups", "length", "never_nonzero", "failures")


class Alerts:
    """Watches the steps of one run; each alert is spoken once, and again only after it has cleared."""

    def __init__(self, names: Iterable[str], group_size: int, past: Iterable[Figures] = ()) -> None:
        """``names``: the rewards that count, metrics left out. ``past``: lines of the steps already done."""
        self._group_size = group_size
        self._steps: deque[Figures] = deque(maxlen=WINDOW)
        self._largest = dict.fromkeys(names, -math.inf)
        self._nonzero: set[str] = set()
        self._raised: set[tuple[str, str]] = set()
        for figures in past:
            if "reward/mean" in figures:  # others are lines of evaluations
                self.step(figures)

    def step(self, figures: Figures) -> tuple[dict[str, float], list[str]]:
        """After one more step: ``alert/<kind>``, 1 where it holds, and a line for each alert that is new."""
        self._steps.append(figures)
        for name, largest in self._largest.items():
            self._largest[name] = max(largest, _figure(figures, f"reward/{name}/max", -math.inf))
            if nonzero(figures, name):
                self._nonzero.add(name)
        found = self._found()
        lines = [line for key, line in found.items() if key not in self._raised]
        self._raised = set(found)
        kinds = {kind for kind, _ in found}
        return {f"alert/{kind}": float(kind in kinds) for kind in KINDS}, lines

    def _found(self) -> dict[tuple[str, str], str]:
        """What holds now: the line of each alert by kind and reward."""
        steps = list(self._steps)
        keys = sorted({key for figures in steps for key in figures if key.startswith("reward/")})
        failing = {key.split("/")[1] for key in keys if key.endswith(("/timeouts", "/errors"))}
        found = {("tied_groups", ""): tied_groups(steps), ("length", ""): length(steps)}
        for name, largest in self._largest.items():
            found["saturated", name] = saturated(steps, name, largest)
            found["never_nonzero", name] = None if name in self._nonzero else never_nonzero(steps, name)
        for name in sorted(failing):
            found["failures", name] = failures(steps, name, self._group_size)
        return {key: line for key, line in found.items() if line is not None}


def saturated(steps: Sequence[Figures], name: str, largest: float) -> str | None:
    """In every step of a full window all completions scored about ``largest``, the largest score seen."""
    if len(steps) < WINDOW or largest <= 0:
        return None
    for figures in steps:
        mean = _figure(figures, f"reward/{name}/mean", -math.inf)
        if mean < SATURATED_SHARE * largest or _figure(figures, f"reward/{name}/std", 0.0) > SATURATED_STD * largest:
            return None
    return (
        f"reward {name} is saturated: every completion of the last {WINDOW} steps scored about {largest:g}. It teaches "
        "nothing any more: make the task harder, or stop here"
    )


def tied_groups(steps: Sequence[Figures]) -> str | None:
    """In each of the last ``TIED_STEPS`` steps nearly all groups earned equal rewards."""
    last = steps[-TIED_STEPS:]
    if len(last) < TIED_STEPS or any(_figure(figures, "rollout/tied_groups", 0.0) < TIED_SHARE for figures in last):
        return None
    return (
        f"{TIED_SHARE:.0%} or more of the groups earned equal rewards in each of the last {TIED_STEPS} steps (mean "
        f"reward {_figure(last[-1], 'reward/mean', math.nan):.3g}): there is hardly anything to learn from. Choose "
        "prompts that are neither too easy nor too hard, raise rollout.group_size or rollout.temperature, or add a "
        "reward that tells completions apart"
    )


def length(steps: Sequence[Figures]) -> str | None:
    """Within groups, reward and length have gone together for a full window."""
    known = [r for figures in steps if math.isfinite(r := _figure(figures, "rollout/length_correlation", math.nan))]
    if len(steps) < WINDOW or len(known) < WINDOW // 2:
        return None
    mean = math.fsum(known) / len(known)
    if abs(mean) < CORRELATION:
        return None
    return (
        f"the {'longer' if mean > 0 else 'shorter'} completions of a prompt earn more: the correlation of length and "
        f"reward was {mean:+.2f} over the last {WINDOW} steps. Read some samples under rollouts/; unless a reward is "
        "meant to do that, one of them can be won by length alone"
    )


def nonzero(figures: Figures, name: str) -> bool:
    """Whether anything but 0 counted in a step. A reward that applied to nothing counts as 0."""
    counted = _figure(figures, f"reward/{name}/counted", math.nan)
    if not math.isnan(counted):
        return counted != 0
    return _figure(figures, f"reward/{name}/mean", 0.0) != 0 or _figure(figures, f"reward/{name}/std", 0.0) != 0


def never_nonzero(steps: Sequence[Figures], name: str) -> str | None:
    """Nothing but 0 counted for a full window."""
    if len(steps) < WINDOW or any(nonzero(figures, name) for figures in steps):
        return None
    return (
        f"reward {name} counted 0 for every completion of {WINDOW} steps: unless it is a penalty that nobody earned, "
        "it is too strict, reads the wrong column, or what it requires never holds. Try it: posttrain rewards try"
    )


def failures(steps: Sequence[Figures], name: str, group_size: int) -> str | None:
    """More than ``FAILED_SHARE`` of the calls of the window ran out of time or failed."""
    timeouts, errors = (
        math.fsum(_figure(figures, f"reward/{name}/{kind}", 0.0) for figures in steps)
        for kind in ("timeouts", "errors")
    )
    calls = group_size * math.fsum(_figure(figures, "rollout/groups", 0.0) for figures in steps)
    if timeouts + errors <= FAILED_SHARE * calls:
        return None
    return (
        f"reward {name} failed on {(timeouts + errors) / calls:.0%} of the completions of the last {len(steps)} steps "
        f"({timeouts:g} timeouts, {errors:g} errors), which scored 0 or nothing for it: raise its timeout or "
        "memory_mib, or mend it"
    )


def _figure(figures: Figures, key: str, missing: float) -> float:
    value = figures.get(key)
    return missing if value is None or math.isnan(value) else value
