"""The configuration tree: frozen, every key checked, documented once, at the field.

Three ways in: a TOML file (``load``), ``rl.train``'s keyword arguments (``from_settings``), a dict (``build``).
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from datetime import time as clock
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from posttrain.rl import algorithms
from posttrain.rl.errors import ConfigError
from posttrain.rl.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    RandomModel,
    RewardSpec,
    RolloutConfig,
    Section,
    TrainerConfig,
    WarmStartConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "RandomModel",
    "RewardSpec",
    "RolloutConfig",
    "Section",
    "TrainerConfig",
    "WarmStartConfig",
    "build",
    "from_settings",
    "load",
]


DEFAULT_ALGORITHM = "grpo"
MAX_SLOT_RANK = 512
"""The largest of vLLM 0.26's ``MaxLoRARanks``."""


def _named(key: str) -> BeforeValidator:
    """Let a bare string stand for a section with only ``key`` set."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _algorithm(value: Any) -> algorithms.Algorithm:
    if isinstance(value, algorithms.Algorithm):
        return value
    if isinstance(value, Mapping):
        return algorithms.parse({"name": DEFAULT_ALGORITHM, **value})
    if isinstance(value, str):
        return algorithms.parse(value)
    raise ValueError('give a name, as "gspo", or a table with name and that algorithm\'s fields')


class Config(Section):
    """Everything a run needs. ``config.toml`` in the run directory holds it in full."""

    model: Annotated[ModelConfig, _named("name")]
    """The base model: a name, or a table."""
    data: Annotated[DataConfig, _named("dataset")] = DataConfig()
    """Where prompts come from: a dataset, or a table."""
    rewards: list[Annotated[RewardSpec, _named("name")]] = Field(default_factory=list)
    """What earns a reward: names, or tables with ``name`` and ``weight``."""
    algorithm: Annotated[SerializeAsAny[algorithms.Algorithm], BeforeValidator(_algorithm)] = Field(
        default_factory=lambda: algorithms.parse(DEFAULT_ALGORITHM)
    )
    """A name (``"gspo"``) or a table with ``name`` (by default grpo) and that algorithm's own fields."""
    rollout: RolloutConfig = RolloutConfig()
    """How completions are drawn."""
    trainer: TrainerConfig = TrainerConfig()
    """How gradients become weights."""
    evaluation: EvalConfig = EvalConfig()
    """Evaluation on held-out rows."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run is saved."""
    logging: LoggingConfig = LoggingConfig()
    """Where metrics go."""
    warm_start: WarmStartConfig | None = None
    """Supervised steps before the first rollout; absent: none."""
    steps: PositiveInt = 100
    """Batches to train on."""
    seed: int = 0
    """Decides the data order, every sample and the adapter's initial weights."""
    output_dir: str = "runs"
    """Folder of all runs; a relative one starts from the working directory."""
    run_name: str | None = None
    """Folder of the run under ``output_dir``; by default the date and time."""
    gpus: PositiveInt = 1
    """GPUs, each with a sampler and a trainer of its own; gradients are summed over them. More than one needs Ray."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of each GPU that the run may take, sampler and trainer together; by default 95 % of what is free."""
    max_restarts: NonNegativeInt = 3
    """How often a dead sampler or trainer is brought back, from the last checkpoint, without a step trained between."""
    placement: Literal["auto", "embedded", "ray"] = "auto"
    """embedded: sampler and trainer in this process; ray: two Ray actors (Ray is started and stopped as needed);
    auto: Ray for vLLM, embedded for the transformers engine."""

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        rollout, trainer, algorithm = self.rollout, self.trainer, self.algorithm
        truncated = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
        if truncated and algorithm.needs_rollout_logprobs:
            raise ValueError(
                f"rollout.top_p/top_k/min_p cut the sampler's distribution, and {algorithm.name}'s correction "
                "compares it with the trainer's full one: switch the truncation off or remove the correction"
            )
        if trainer.method == "full" and algorithm.needs_reference:
            raise ValueError(
                "algorithm.kl_coef needs the base model as reference, which full fine-tuning overwrites: "
                'use trainer.method = "lora" or kl_coef = 0'
            )
        if trainer.method == "full" and self.model.quantization != "none":
            raise ValueError(
                f'model.quantization = "{self.model.quantization}" keeps the base frozen: use trainer.method = "lora"'
            )
        if self.gpus > 1 and self.placement == "embedded":
            raise ValueError(f'gpus = {self.gpus} needs a process for each: use placement = "ray" or leave it out')
        if self.gpus > 1 and trainer.device == "cpu":
            raise ValueError(f'gpus = {self.gpus} and trainer.device = "cpu" contradict each other: leave one out')
        if rollout.kv_cache_gib and rollout.engine == "transformers":
            raise ValueError(
                "rollout.kv_cache_gib is vLLM's: the transformers engine takes what rollout.max_sequences need"
            )
        if rollout.kv_cache_gib and self.gpu_memory_gib and rollout.kv_cache_gib >= self.gpu_memory_gib:
            raise ValueError(
                f"rollout.kv_cache_gib ({rollout.kv_cache_gib:g}) leaves nothing of gpu_memory_gib "
                f"({self.gpu_memory_gib:g}) for the model: lower it or leave it out"
            )
        if rollout.lora_backend == "slots" and trainer.lora.rank > MAX_SLOT_RANK:
            raise ValueError(
                f'rollout.lora_backend = "slots" goes up to trainer.lora.rank = {MAX_SLOT_RANK} '
                f'(got {trainer.lora.rank}): use "dense", which takes any'
            )
        if self.warm_start and algorithm.needs_reference:
            raise ValueError(
                "algorithm.kl_coef would pull the warm-started adapter back to the untrained base: "
                "use kl_coef = 0 with warm_start"
            )
        if rollout.prompts_per_step % trainer.updates_per_batch:
            raise ValueError(
                f"rollout.prompts_per_step ({rollout.prompts_per_step}) must be a multiple of "
                f"trainer.updates_per_batch ({trainer.updates_per_batch})"
            )
        if self.max_model_len < self.data.max_prompt_tokens + rollout.max_tokens:
            raise ValueError(
                f"rollout.max_model_len ({self.max_model_len}) is less than data.max_prompt_tokens "
                f"({self.data.max_prompt_tokens}) + rollout.max_tokens ({rollout.max_tokens}): raise it or leave it out"
            )
        if self.evaluation.temperature == 0 and self.evaluation.samples > 1:
            raise ValueError("evaluation.temperature = 0 draws the same sample again: set evaluation.samples = 1")
        if rollout.group_size < 2 and algorithm.needs_groups:
            raise ValueError(
                f"{algorithm.name} compares completions of one prompt: rollout.group_size must be at least 2 "
                "(reinforce_pp works with 1)"
            )
        if self.evaluation.every and not (self.data.eval_rows or self.data.eval_split or self.data.eval_dataset):
            raise ValueError(
                "evaluation.every needs held-out rows: set data.eval_split, data.eval_dataset or data.eval_rows"
            )
        return self

    @property
    def max_model_len(self) -> int:
        """Longest prompt and completion together, in tokens."""
        return self.rollout.max_model_len or self.data.max_prompt_tokens + self.rollout.max_tokens

    def tree(self) -> dict[str, Any]:
        """Plain dict without the unset fields: what ``config.toml`` holds and ``build`` takes back."""
        return self.model_dump(mode="json", exclude_none=True)


_SHORTHANDS = {"model": "name", "data": "dataset", "algorithm": "name"}
"""Section → the field that a bare string stands for."""
_FLAT = ("model", "data", "rollout", "trainer", "logging")
"""Sections whose fields ``from_settings`` takes by their own names."""


def build(tree: Mapping[str, Any]) -> Config:
    """Validate a nested dict; raises ``ConfigError`` with one line a problem."""
    try:
        return Config(**tree)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for problem in error.errors():
            for where, message in _explain(problem):
                found.setdefault(where, []).append(message)
        lines = [": ".join(filter(None, (where, "; or ".join(messages)))) for where, messages in found.items()]
        raise ConfigError("\n".join(lines)) from None


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply ``a.b=value`` overrides (values in TOML; a bare word is a string) and validate."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a TOML configuration") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _set(tree, override)
    return build(tree)


def from_settings(onto: Mapping[str, Any] | None = None, /, **settings: object) -> Config:
    """Build from keyword arguments: sections (``rollout={…}``), or a field of data, rollout, trainer or logging by its
    own name (``group_size=8``) where only one of them has it. ``onto``: a tree that the settings change.
    """
    homes = _homes()
    tree: dict[str, Any] = dict(onto or {})
    flat: list[tuple[str, str, object]] = []
    for key, value in settings.items():
        if key in Config.model_fields:
            section = _as_table(key, value)
            tree[key] = {**_as_table(key, tree[key]), **section} if key in _sections() and key in tree else section
        elif len(sections := homes.get(key, [])) == 1:
            flat.append((sections[0], key, value))
        elif sections:
            choices = " or ".join(f"{section}={{{key!r}: …}}" for section in sections)
            raise ConfigError(f"{key} stands in several sections: write {choices}")
        else:
            raise ConfigError(f"unknown setting {key}{_did_you_mean(key, [*Config.model_fields, *homes])}")
    for section, key, value in flat:
        tree[section] = {**_as_table(section, tree.get(section, {})), key: value}
    return build(tree)


def _as_table(section: str, value: Any) -> Any:
    """A section's shorthand string or model as the table it stands for; anything else as it is."""
    if isinstance(value, str) and section in _SHORTHANDS:
        return {_SHORTHANDS[section]: value}
    return value.model_dump(exclude_unset=True) if isinstance(value, Section) else value


def _sections() -> dict[str, type[BaseModel]]:
    """Section name → model, for the sections that flat names reach."""
    found: dict[str, type[BaseModel]] = {}
    for name, info in Config.model_fields.items():
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                found[name] = kind
    return found


def _homes() -> dict[str, list[str]]:
    """Field name → the sections that have it, of those whose fields may be given by their own names."""
    homes: dict[str, list[str]] = {}
    for section, model in _sections().items():
        if section in _FLAT:
            for field in model.model_fields:
                homes.setdefault(field, []).append(section)
    return homes


def _set(tree: dict[str, Any], override: str) -> None:
    """Apply one ``a.b=value``."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: write key=value, for example --set trainer.learning_rate=1e-5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if isinstance(value, date | clock):  # no field holds one, but a run may be called 2026-11-22
        value = text.strip()
    *parents, leaf = key.strip().split(".")
    node = tree
    for depth, parent in enumerate(parents):
        child = _as_table(parent, node.get(parent, {}))
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: depth + 1])} is not a table")
        node[parent] = child
        node = child
    node[leaf] = value


def _explain(problem: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Place and message of one of pydantic's errors, with the nearest existing key for an unknown one."""
    # Pydantic names the alternatives of a union in the path, as in lora.target_modules.list[str]; users do not.
    path = [str(part) for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = _model_at(path[:-1]).model_fields
        return [(where, f"unknown key{_did_you_mean(path[-1], list(known))}")]
    if problem["type"] == "missing":
        return [(where, "missing; it has no default")]
    message = problem["msg"].removeprefix("Value error, ")
    if where == "algorithm":  # it explains its own fields, a line each
        parts = [re.match(r"([\w.]+): (.*)", line) for line in message.splitlines()]
        if all(parts):
            return [(f"algorithm.{part[1]}", part[2]) for part in parts if part]
    given = f" (got {problem['input']!r})" if where and not isinstance(problem["input"], Mapping | BaseModel) else ""
    return [(where, message + given)]


def _model_at(path: Sequence[str]) -> type[BaseModel]:
    """The section at a path such as ``trainer.lora`` or ``rewards.0``."""
    model: type[BaseModel] = Config
    for part in path:
        if not part.isdigit():
            model = next(_models_in(model.model_fields[part].annotation), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[Section]]:
    """The sections named in an annotation: itself, or inside ``| None``, ``list[…]`` or ``Annotated``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _did_you_mean(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(sorted(set(known)))}"
