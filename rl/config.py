"""The configuration tree: frozen, every key checked, documented once, at the field.

Three ways in: a TOML file (``load``), ``rl.train``'s keyword arguments (``from_settings``), a dict (``build``).
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from posttrain.rl import algorithms
from posttrain.rl.errors import ConfigError


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, field docstrings become the documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _named(key: str) -> BeforeValidator:
    """Let a bare string stand for a section with only ``key`` set."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class RandomModel(Section):
    """A random-weight model, built from a transformers configuration; for tests, benchmarks and the quick start."""

    config: dict[str, Any]
    """Keyword arguments of the architecture's configuration, ``model_type`` included."""
    characters: str | None = None
    """Build a one-token-a-character tokenizer over these characters; without it ``model.tokenizer`` must be set."""
    seed: int = 0


class ModelConfig(Section):
    """The base model; a bare string is its name."""

    name: str | None = None
    """Hub name or local folder of any transformers causal LM."""
    random: RandomModel | None = None
    """Build a random-weight model instead of loading ``name``."""
    tokenizer: str | None = None
    """Hub name or folder of the tokenizer, where it is not the model's own."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run model code from the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Type of weights and activations; auto: bfloat16 (float16 before Ampere) on a GPU, float32 on a CPU."""
    chat_template: str | None = None
    """A Jinja chat template, or the path of one, in place of the tokenizer's."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.name is None) == (self.random is None):
            raise ValueError("give exactly one of model.name (hub name or folder) and model.random")
        return self


class DataConfig(Section):
    """Where prompts come from; a bare string is the dataset."""

    dataset: str | None = None
    """Hub name, local .jsonl/.json/.parquet/.csv file or folder, or ``module:function`` / ``file.py:function`` that
    returns an iterable of rows. Absent when rows are handed to ``rl.train``."""
    subset: str | None = None
    """The dataset's configuration name on the hub."""
    split: str = "train"
    prompt_column: str | None = None
    """Column with the prompt, text or chat messages; by default the first of prompt, messages, question, problem."""
    answer_after: str | None = None
    """Keep only what follows this mark in the ``answer`` column (GSM8K: ``####``)."""
    system_prompt: str | None = None
    """Put in front of every prompt as a system turn."""
    worked_turns: list[dict[str, str]] = Field(default_factory=list)
    """Chat turns shown before every prompt (after the system turn)."""
    chat: bool | None = None
    """Apply the chat template to text prompts; by default whenever the tokenizer has one."""
    shuffle: bool = True
    """Reshuffle at every epoch, by ``seed``."""
    max_prompt_tokens: PositiveInt = 2048
    """Longer prompts are left out, and counted."""
    eval_dataset: str | None = None
    """Held-out dataset, same forms as ``dataset``; by default the same dataset."""
    eval_split: str | None = None
    """Held-out split."""
    eval_rows: NonNegativeInt = 0
    """Hold out this many rows of the training split (chosen by ``seed``) when there is no evaluation split."""


class RewardSpec(Section):
    """A reward by name; a bare string is the name."""

    name: str
    """A built-in, ``module:function`` or ``file.py:function``."""
    weight: float | None = None
    """In place of the function's own weight."""


class LoraConfig(Section):
    """Low-rank adaptation (2106.09685)."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """``all-linear`` (every linear layer but the head) or module name endings such as ``q_proj``."""
    rank_stabilized: bool = False
    """Scale by alpha/√rank instead of alpha/rank (2312.03732)."""


class RolloutConfig(Section):
    """How completions are drawn."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """auto: vLLM on a GPU where it is installed, else the embedded transformers engine."""
    prompts_per_step: PositiveInt = 8
    group_size: PositiveInt = 8
    """Completions of each prompt."""
    max_tokens: PositiveInt = 512
    """Longest completion."""
    temperature: PositiveFloat = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: NonNegativeInt = 0
    min_p: float = Field(default=0.0, ge=0, lt=1)
    stop_token_ids: list[int] = Field(default_factory=list)
    """Further stop tokens beside every end token the model declares."""
    max_staleness: NonNegativeInt = 0
    """0: strictly on-policy. n: generation runs ahead by up to n steps while the trainer works."""
    max_refills: NonNegativeInt = 8
    """With dynamic sampling: how often the missing prompts are drawn anew before the step goes on with fewer."""
    max_sequences: PositiveInt = 64
    """Sequences decoded at once by the transformers engine."""
    gpu_memory_utilization: float = Field(default=0.5, gt=0, lt=1)
    """Share of the GPU's memory that vLLM may take."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and completion together; by default ``data.max_prompt_tokens + rollout.max_tokens``."""
    enforce_eager: bool = False
    """Run vLLM without CUDA graphs: starts sooner, samples slower."""


class TrainerConfig(Section):
    """How gradients become weights."""

    method: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter, or every weight."""
    lora: LoraConfig = LoraConfig()
    learning_rate: PositiveFloat = 2e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; linear and cosine fall to 0 at the last step."""
    warmup_steps: NonNegativeInt = 0
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """``adamw_8bit`` needs the extra ``bnb``."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 16384
    """Packed tokens a forward pass holds; the gradient does not depend on it."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps a batch is cut into; its groups are dealt out to them in order."""
    epochs_per_batch: PositiveInt = 1
    """Passes over each batch (GRPO's μ)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: PositiveInt | None = None
    """Threads that sampler and trainer each use on a CPU; by default 1 for a small model, else every core."""


class EvalConfig(Section):
    """Evaluation on the held-out rows."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0: none. With it, there is one before the first and one after the last step too."""
    samples: PositiveInt = 4
    """Completions of each prompt: pass@1 and pass@``samples``."""
    max_prompts: PositiveInt = 256
    temperature: NonNegativeFloat = 1.0
    success: float = 1.0
    """A completion passes when its reward reaches this."""


class CheckpointConfig(Section):
    """When the run is saved. It is always saved at its end and at Ctrl-C."""

    every: NonNegativeInt = 20
    """Steps between checkpoints; 0: only at the end."""
    keep: PositiveInt = 3
    """Newest checkpoints kept."""


class LoggingConfig(Section):
    """Where metrics go besides ``metrics.jsonl``, which is always written."""

    console: Literal["auto", "plain", "off"] = "auto"
    """auto: a live display on a terminal, plain lines elsewhere."""
    rollouts_every: NonNegativeInt = 1
    """Steps between tables of rollouts under ``rollouts/``; 0: none."""
    tensorboard: bool = False
    """Also write TensorBoard events under ``logs/`` (extra ``tensorboard``)."""
    wandb_project: str | None = None
    """Also log to this W&B project (extra ``wandb``)."""
    wandb_mode: Literal["online", "offline"] = "online"
    plot: bool = True
    """Write the reward curve to ``reward.png`` at the end."""


class WarmStartConfig(Section):
    """Supervised steps before the first rollout, on demonstrations; the optimizer starts afresh after them."""

    dataset: str | None = None
    """Same forms as ``data.dataset``. Absent when rows are handed to ``rl.train``."""
    completion_column: str = "completion"
    steps: PositiveInt = 100
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3


def _algorithm(value: Any) -> algorithms.Algorithm:
    return value if isinstance(value, algorithms.Algorithm) else algorithms.parse(value)


class Config(Section):
    """Everything a run needs. ``config.toml`` in the run directory holds it in full."""

    model: Annotated[ModelConfig, _named("name")]
    data: Annotated[DataConfig, _named("dataset")] = DataConfig()
    rewards: list[Annotated[RewardSpec, _named("name")]] = Field(default_factory=list)
    algorithm: Annotated[SerializeAsAny[algorithms.Algorithm], BeforeValidator(_algorithm)] = Field(
        default_factory=lambda: algorithms.parse("grpo")
    )
    """A name (``"gspo"``) or a table with ``name`` and that algorithm's own fields."""
    rollout: RolloutConfig = RolloutConfig()
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    warm_start: WarmStartConfig | None = None
    steps: PositiveInt = 100
    """Batches to train on."""
    seed: int = 0
    """Decides the data order, every sample and the adapter's initial weights."""
    output_dir: str = "runs"
    run_name: str | None = None
    """Folder of the run under ``output_dir``; by default the date and time."""
    placement: Literal["embedded", "ray"] = "embedded"
    """embedded: sampler and trainer in this process; ray: two Ray actors (Ray is started and stopped as needed)."""

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
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply ``a.b=value`` overrides (values in TOML; a bare word is a string) and validate."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a TOML configuration") from None
    except tomllib.TOMLDecodeError as error:
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
    *parents, leaf = key.strip().split(".")
    node = tree
    for depth, parent in enumerate(parents):
        child = _as_table(parent, node.get(parent, {}))
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: depth + 1])} is not a table")
        node[parent] = child
        node = child
    node[leaf] = value


def _explain(problem: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors, with the nearest existing key for an unknown one."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, key = (str(part) for part in problem["loc"])
        model: type[BaseModel] | None = Config if not parents else _sections().get(parents[0])
        hint = _did_you_mean(key, list(model.model_fields)) if model else ""
        return f"{where}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{where}: missing; it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    given = f" (got {problem['input']!r})" if where and not isinstance(problem["input"], Mapping | BaseModel) else ""
    return f"{where}: {message}{given}" if where else message


def _did_you_mean(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(sorted(set(known)))}"
