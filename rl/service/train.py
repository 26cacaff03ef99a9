"""``rl.train``: keyword arguments in, a finished run out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.rl import config as configuration
from posttrain.rl.errors import ConfigError
from posttrain.rl.run_dir import RunDir
from posttrain.rl.service import run
from posttrain.rl.service.inputs import IN_PYTHON, Given, named_rewards
from posttrain.rl.service.run import RunResult

Rows = Iterable[Mapping[str, Any]]


def train(
    *,
    dataset: str | Rows | None = None,
    rewards: Sequence[str | Callable[..., Any]] = (),
    eval_dataset: str | Rows | None = None,
    demonstrations: str | Rows | None = None,
    resume: str | Path | None = None,
    **settings: Any,
) -> RunResult:
    """Train a model with reinforcement learning and return the finished run.

    ``rewards`` are functions tagged with ``rl.reward`` (or plain ones) or names; ``dataset``, ``eval_dataset`` and
    ``demonstrations`` (for ``warm_start``) are hub names, files, or any iterable of dicts. ``settings`` are the
    configuration's fields: ``model``, ``algorithm``, ``steps``, whole sections (``rollout={"group_size": 8}``) or a
    section's field by its own name (``group_size=8``). ``resume`` goes on with a run as it was configured, with
    ``settings`` changed. Raises ``ConfigError`` for anything that does not fit.
    """
    functions, names = _split(rewards)
    if rewards:
        settings["rewards"] = [spec.model_dump(exclude_none=True) for spec in named_rewards(functions)] or names
    rows = {"dataset": dataset, "eval_dataset": eval_dataset}
    settings |= {key: _named(value) for key, value in rows.items() if value is not None}
    stored = RunDir.open(resume) if resume is not None else None
    onto = stored.config() if stored else {}
    if demonstrations is not None:
        warm_start = settings.get("warm_start") or onto.get("warm_start") or {}
        settings["warm_start"] = {**warm_start, "dataset": _named(demonstrations)}
    config = configuration.from_settings(onto, **settings)
    given = Given(functions, _handed_over(dataset), _handed_over(eval_dataset), _handed_over(demonstrations))
    return run.train(
        config, resume=stored.path if stored else None, base=stored.base() if stored else None, given=given
    )


def _named(rows: str | Rows) -> str:
    return rows if isinstance(rows, str) else IN_PYTHON


def _handed_over(rows: str | Rows | None) -> Rows | None:
    return None if isinstance(rows, str) else rows


def _split(rewards: Sequence[str | Callable[..., Any]]) -> tuple[list[Callable[..., Any]], list[str]]:
    """Functions and names; one run takes one kind, or it could not be told which stands for which when resumed."""
    functions = [reward for reward in rewards if callable(reward)]
    names = [reward for reward in rewards if isinstance(reward, str)]
    if len(functions) + len(names) != len(rewards):
        raise ConfigError("rewards: give functions or names")
    if functions and names:
        from posttrain.rl.rewards import resolve

        return [resolve(reward) if isinstance(reward, str) else reward for reward in rewards], []
    return functions, names
