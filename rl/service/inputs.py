"""What a run is given besides its configuration: reward functions and rows, by name or handed over in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.rl.config import Config, RewardSpec
from posttrain.rl.data import columns_of, load_demonstrations, load_rows, prompt_column, split_eval
from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards import Rubric, reference, resolve
from posttrain.rl.rewards.combining import Override
from posttrain.rl.rewards.signature import read
from posttrain.rl.rows import Rows
from posttrain.rl.types import Prompt

IN_PYTHON = "<given in Python>"
"""Stands in ``config.toml`` for what has no name to find it by again."""

Row = Mapping[str, Any]


@dataclass(slots=True, frozen=True)
class Given:
    """What was handed over in Python instead of being named in the configuration."""

    rewards: Sequence[Callable[..., Any]] = ()
    rows: Iterable[Row] | None = None
    eval_rows: Iterable[Row] | None = None
    demonstrations: Iterable[Row] | None = None


@dataclass(slots=True, frozen=True)
class Inputs:
    """Checked: every reward's arguments exist as columns, every dataset could be opened."""

    rubric: Rubric
    rows: Rows
    eval_rows: Rows | None
    demonstrations: list[tuple[Prompt, str]]


def gather(config: Config, given: Given, base: Path | None) -> Inputs:
    """Resolve rewards and rows, and check that they fit each other; nothing heavy is loaded for it."""
    rubric = _rubric(config, given, base)
    if not rubric.combining.weights(step=0):
        raise ConfigError("every reward is a metric, and metrics are no part of the reward: add one with @rl.reward")
    rows = load_rows(_rows(given.rows, config.data.dataset, "dataset", "data.dataset"), config.data, base=base)
    rows, eval_rows = _held_out(config, given, rows, base)
    column = prompt_column(columns_of(rows), config.data)
    rubric.check(name for name in columns_of(rows) if name != column)
    if eval_rows is not None:
        rubric.check(name for name in columns_of(eval_rows) if name != column)
    demonstrations: list[tuple[Prompt, str]] = []
    if config.warm_start:
        spec = _rows(given.demonstrations, config.warm_start.dataset, "demonstrations", "warm_start.dataset")
        demonstrations = load_demonstrations(spec, config.warm_start, config.data, base=base)
    return Inputs(rubric, rows, eval_rows, demonstrations)


def named_rewards(functions: Sequence[Callable[..., Any]]) -> list[RewardSpec]:
    """Specs for ``config.toml`` by which a resumed run finds the functions again, where they can be found."""
    specs = []
    for function in functions:
        try:
            specs.append(RewardSpec(name=reference(function)))
        except ConfigError:
            specs.append(RewardSpec(name=f"{IN_PYTHON}:{read(function).name}"))
    return specs


def _rubric(config: Config, given: Given, base: Path | None) -> Rubric:
    if given.rewards:
        return Rubric(given.rewards)
    if not config.rewards:
        raise ConfigError('no rewards: set rewards = ["math_answer"], or name your own as "file.py:function"')
    functions, overrides = [], {}
    for spec in config.rewards:
        if spec.name.startswith(IN_PYTHON):
            raise ConfigError(
                f"the reward {spec.name.removeprefix(IN_PYTHON + ':')} was given in Python: "
                "go on with rl.train(resume=…, rewards=[…])"
            )
        functions.append(resolve(spec.name, base, spec.settings))
        overrides[read(functions[-1]).name] = _override(spec)
    return Rubric(functions, overrides)


def _override(spec: RewardSpec) -> Override:
    """What a configuration says in place of the decorator."""
    override = Override()
    if spec.weight is not None:
        override["weight"] = spec.weight
    if spec.requires is not None:
        override["requires"] = spec.requires
    if spec.clip is not None:
        override["clip"] = spec.clip
    return override


def _rows(given: Iterable[Row] | None, named: str | None, argument: str, key: str) -> str | Iterable[Row]:
    if given is not None:
        return given
    if named is None:
        raise ConfigError(f"no {argument}: set {key} to a hub name, a file or module:function, or pass {argument}=…")
    if named == IN_PYTHON:
        raise ConfigError(f"{key} was given in Python: go on with rl.train(resume=…, {argument}=…)")
    return named


def _held_out(config: Config, given: Given, rows: Rows, base: Path | None) -> tuple[Rows, Rows | None]:
    """Training rows and held-out rows, if there are any to be."""
    data = config.data
    if given.eval_rows is not None or data.eval_dataset is not None:
        spec = _rows(given.eval_rows, data.eval_dataset, "eval_dataset", "data.eval_dataset")
        return rows, load_rows(spec, data, split=data.eval_split, base=base)
    if data.eval_split is not None:
        if data.dataset is None:
            raise ConfigError("data.eval_split is a split of a named dataset; for rows in Python pass eval_dataset=…")
        return rows, load_rows(data.dataset, data, split=data.eval_split, base=base)
    if data.eval_rows:
        return split_eval(rows, data.eval_rows, config.seed, column=prompt_column(columns_of(rows), data))
    return rows, None
