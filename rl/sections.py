"""The sections of the configuration: frozen, unknown keys refused, each field documented under it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, field docstrings become the documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class RandomModel(Section):
    """A random-weight model, built from a transformers configuration; for tests, benchmarks and the quick start."""

    config: dict[str, Any]
    """Keyword arguments of the architecture's configuration, ``model_type`` included."""
    characters: str | None = None
    """Build a one-token-a-character tokenizer over these characters; without it ``model.tokenizer`` must be set."""
    seed: int = 0
    """Decides the weights."""

    @field_validator("config")
    @classmethod
    def _writable(cls, config: dict[str, Any]) -> dict[str, Any]:
        if empty := [key for key, value in config.items() if value is None]:
            raise ValueError(f"{', '.join(empty)}: TOML has no null, leave the key out")
        return config


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
    quantization: Literal["none", "nf4", "fp8"] = "none"
    """Hold the frozen linear layers in 4 bits (bitsandbytes' NF4, 2305.14314) or 8 (float8_e4m3fn, a scale a layer).
    The adapter trains in float32 either way. LoRA only."""
    chat_template: str | None = None
    """A Jinja chat template, or the path of one, in place of the tokenizer's."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if bool(self.name) == (self.random is not None):
            raise ValueError("give exactly one of model.name (hub name or folder) and model.random")
        return self


class DataConfig(Section):
    """Where prompts come from; a bare string is the dataset."""

    dataset: str | None = None
    """Hub name, local .jsonl/.json/.parquet/.csv file or folder, or ``module:function`` / ``file.py:function`` that
    returns an iterable of rows, or a task of reasoning-gym such as ``reasoning_gym:chain_sum?max_terms=3&size=4000``.
    Absent when rows are handed to ``rl.train``."""
    subset: str | None = None
    """The dataset's configuration name on the hub."""
    split: str = "train"
    """Split to train on."""
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
    weight: float | list[tuple[NonNegativeInt, float]] | None = None
    """In place of the function's own weight: a number, or ``[[step, weight], …]``, linear in between."""
    requires: list[str] | None = None
    """Rewards, by the names their metrics have, that must be above 0 for this score to count; it is 0 otherwise."""
    clip: tuple[float, float] | None = None
    """Smallest and largest score, before the weight."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reward, such as a judge's ``model``."""


Decay = Annotated[float, Field(ge=0, lt=1)]


class LoraConfig(Section):
    """Low-rank adaptation (2106.09685)."""

    rank: PositiveInt = 16
    """Inner width of each pair of matrices."""
    alpha: PositiveFloat = 32.0
    """The adapter's output is scaled by alpha/rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """``all-linear`` (every linear layer but the head) or module name endings such as ``q_proj``."""
    rank_stabilized: bool = False
    """Scale by alpha/√rank instead of alpha/rank (2312.03732)."""


class RolloutConfig(Section):
    """How completions are drawn."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """auto: vLLM on a GPU where it is installed, else the embedded transformers engine."""
    prompts_per_step: PositiveInt = 8
    """Prompts of one batch."""
    group_size: PositiveInt = 8
    """Completions of each prompt."""
    max_tokens: PositiveInt = 512
    """Longest completion."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, the trainer's too."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this much probability; 1: off."""
    top_k: NonNegativeInt = 0
    """Sample from this many of the likeliest tokens; 0: off."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Leave out tokens less likely than this share of the likeliest one; 0: off."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """Further stop tokens beside every end token the model declares."""
    max_staleness: NonNegativeInt = 0
    """0: strictly on-policy. n: generation runs ahead by up to n steps while the trainer works."""
    max_refills: NonNegativeInt = 8
    """With dynamic sampling: how often the missing prompts are drawn anew before the step goes on with fewer."""
    max_sequences: PositiveInt = 64
    """Sequences decoded at once by the transformers engine."""
    kv_cache_gib: PositiveFloat | None = None
    """Memory of vLLM's KV cache; by default worked out from ``gpu_memory_gib`` and what the run needs."""
    fp8_activations: bool = False
    """With an fp8 base: round activations to fp8, too, as vLLM does by itself. Prompts are read faster, but sampler and
    trainer then differ by 0.1 to 0.2 nats a token."""
    lora_backend: Literal["auto", "dense", "slots"] = "auto"
    """How vLLM applies the adapter: ``dense``, two matrix products beside each layer, any rank, one adapter;
    ``slots``, vLLM's own multi-adapter kernels. auto: dense, the faster one (README, Measured)."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and completion together; by default ``data.max_prompt_tokens + rollout.max_tokens``."""
    enforce_eager: bool = False
    """Run vLLM without CUDA graphs: starts sooner, samples slower."""


class TrainerConfig(Section):
    """How gradients become weights."""

    method: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter, or every weight."""
    lora: LoraConfig = LoraConfig()
    """The adapter, with ``method = "lora"``."""
    learning_rate: PositiveFloat = 2e-5
    """The highest of the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; linear and cosine fall to 0 at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises from 0."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """``adamw_8bit`` needs the extra ``bnb``."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """AdamW's decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """AdamW's term against division by zero."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, decoupled."""
    max_grad_norm: PositiveFloat = Field(default=1.0, allow_inf_nan=True)
    """Global gradient norm to clip to; ``inf``: no clipping."""
    micro_batch_tokens: PositiveInt = 16384
    """Packed tokens a forward pass holds; the gradient does not depend on it."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps a batch is cut into; its groups are dealt out to them in order."""
    epochs_per_batch: PositiveInt = 1
    """Passes over each batch (GRPO's μ)."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a quarter more time. auto: on a GPU, where the
    largest micro-batch would not fit without."""
    offload_activations: bool = False
    """Where activations are recomputed: what is kept of each layer goes to pinned host memory meanwhile."""
    share_prompts: bool = True
    """Compute a prompt once for all completions of its group in a micro-batch; the gradients are the same."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """``triton``: the kernels of this package; ``reference``: torch alone. auto: triton on an NVIDIA GPU."""
    copy_repacked_weights: bool = False
    """Where vLLM stores a base weight in a form that only it can read, load a private copy of that weight; by default
    such a model is refused."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    cpu_threads: PositiveInt | None = None
    """Threads that sampler and trainer each use on a CPU; by default 1 for a small model, else every core."""


class EvalConfig(Section):
    """Evaluation on the held-out rows."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0: none. With it, there is one before the first and one after the last step too."""
    samples: PositiveInt = 4
    """Completions of each prompt: pass@1 and pass@``samples``."""
    max_prompts: PositiveInt = 256
    """At most this many held-out rows."""
    temperature: NonNegativeFloat = 1.0
    """0: greedy."""
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
    """offline: written under ``logs/wandb``, for ``wandb sync`` later."""
    plot: bool = True
    """Write the reward curve to ``reward.png`` at the end."""


class WarmStartConfig(Section):
    """Supervised steps before the first rollout, on demonstrations; the optimizer starts afresh after them."""

    dataset: str | None = None
    """Same forms as ``data.dataset``. Absent when rows are handed to ``rl.train``."""
    completion_column: str = "completion"
    """Column with the text to imitate."""
    steps: PositiveInt = 100
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Demonstrations a step."""
    learning_rate: PositiveFloat = 1e-3
    """Constant."""
