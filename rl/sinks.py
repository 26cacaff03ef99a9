"""Where a run's figures and samples go: files always; console, W&B and TensorBoard by configuration."""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Protocol

from posttrain.rl.config import LoggingConfig
from posttrain.rl.console import ConsoleSink
from posttrain.rl.errors import ConfigError, PosttrainError
from posttrain.rl.run_dir import RunDir
from posttrain.rl.types import RolloutGroup


class Sink(Protocol):
    """One destination. ``start`` comes first, ``close`` last; ``close`` may come twice."""

    def start(self, run: RunDir) -> None:
        """Open whatever is written to; raising here stops the run before it begins."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of one step, or of an evaluation after it (keys ``eval/…``)."""
        ...

    def rollouts(self, step: int, groups: Sequence[RolloutGroup], *, evaluation: bool = False) -> None:
        """Samples of one step."""
        ...

    def message(self, text: str) -> None:
        """Something the user should read."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


def rollout_rows(step: int, groups: Iterable[RolloutGroup]) -> list[dict[str, Any]]:
    """One flat row a sample, everything a browser of samples needs."""
    return [
        {
            "step": step,
            "prompt_id": group.prompt.id,
            "prompt": group.prompt.source,
            "columns": dict(group.prompt.columns),
            "completion": rollout.completion.text,
            "finish_reason": rollout.completion.finish_reason,
            "rewards": rollout.rewards,
            "counted": rollout.counted,
            "weights": rollout.weights,
            "failures": rollout.failures,
            "reward": rollout.reward,
            "advantage": rollout.advantage,
            "completion_length": len(rollout.completion.completion_ids),
            "policy_version": rollout.completion.policy_version,
            "completion_ids": list(rollout.completion.completion_ids),
            "rollout_logprobs": list(rollout.completion.rollout_logprobs),
        }
        for group in groups
        for rollout in group.rollouts
    ]


class FileSink:
    """``metrics.jsonl``, ``rollouts/`` and ``logs/messages.log`` of the run directory."""

    def start(self, run: RunDir) -> None:
        """Remember where."""
        self._run = run
        run.logs_dir.mkdir(exist_ok=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        self._run.append_metrics(step, values)

    def rollouts(self, step: int, groups: Sequence[RolloutGroup], *, evaluation: bool = False) -> None:
        """Write one table."""
        self._run.write_rollouts(step, rollout_rows(step, groups), evaluation=evaluation)

    def message(self, text: str) -> None:
        """Append with the time."""
        with self._run.messages_file.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().isoformat(timespec='seconds')} {text}\n")

    def close(self) -> None:
        """Nothing stays open between calls."""


class WandbSink:
    """Weights & Biases; a resumed run goes on under the same id."""

    _COLUMNS = ("prompt", "completion", "finish_reason", "reward", "advantage", "completion_length", "policy_version")

    def __init__(self, project: str, mode: Literal["online", "offline"]) -> None:
        self._project = project
        self._mode: Literal["online", "offline"] = mode
        self._closed = False

    def start(self, run: RunDir) -> None:
        """Start or go on; ``step`` is a metric of ours, since W&B's own counter cannot go back on resume."""
        try:
            import wandb
        except ImportError:
            raise ConfigError('logging.wandb_project needs W&B: pip install "posttrain[wandb]"') from None
        self._wandb = wandb
        run.logs_dir.mkdir(exist_ok=True)
        known = run.wandb_id_file.read_text().strip() if run.wandb_id_file.exists() else ""
        run_id = known or uuid.uuid4().hex[:12]
        try:
            self._wandb_run = wandb.init(
                project=self._project,
                name=run.path.resolve().name,
                id=run_id,
                resume="allow" if known and self._mode == "online" else None,
                mode=self._mode,
                dir=str(run.logs_dir),
                config=run.config(),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # whatever W&B raises: no key, no network, no such project
            raise ConfigError(
                f'W&B did not start ({error}): run "wandb login", or set logging.wandb_mode = "offline"'
            ) from error
        run.wandb_id_file.write_text(run_id + "\n")
        self._wandb_run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One history row."""
        self._wandb_run.log({"step": step, **values})

    def rollouts(self, step: int, groups: Sequence[RolloutGroup], *, evaluation: bool = False) -> None:
        """One table, a column for each reward function."""
        rows = rollout_rows(step, groups)
        names = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
        table = self._wandb.Table(columns=[*self._COLUMNS, *(f"reward/{name}" for name in names)])
        for row in rows:
            cells = [str(row[key]) if key == "prompt" else row[key] for key in self._COLUMNS]
            table.add_data(*cells, *(row["rewards"].get(name) for name in names))
        self._wandb_run.log({"step": step, "eval_rollouts" if evaluation else "rollouts": table})

    def message(self, text: str) -> None:
        """W&B keeps figures only; messages are in ``logs/messages.log``."""

    def close(self) -> None:
        """Upload what is left."""
        if not self._closed:
            self._closed = True
            self._wandb_run.finish()


class TensorboardSink:
    """TensorBoard events under ``logs/tensorboard``; a resumed run hides what it is about to repeat."""

    def __init__(self, first_step: int) -> None:
        self._first_step = first_step

    def start(self, run: RunDir) -> None:
        """Open the event file."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError('logging.tensorboard needs TensorBoard: pip install "posttrain[tensorboard]"') from None
        purge = self._first_step + 1 if self._first_step else None
        self._writer = SummaryWriter(str(run.logs_dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a key."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def rollouts(self, step: int, groups: Sequence[RolloutGroup], *, evaluation: bool = False) -> None:
        """The first few samples as text."""
        tag = "eval_rollouts" if evaluation else "rollouts"
        for index, row in enumerate(rollout_rows(step, groups)[:4]):
            text = f"**reward {row['reward']:.3f}** {row['prompt']}\n\n{row['completion']}"
            self._writer.add_text(f"{tag}/{index}", text, step)

    def message(self, text: str) -> None:
        """TensorBoard has no place for messages; they are in ``logs/messages.log``."""

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class Sinks:
    """All destinations of a run as one. Files must work; the others may fail later without stopping the run."""

    def __init__(self, run: RunDir, required: Sequence[Sink], optional: Sequence[Sink], rollouts_every: int) -> None:
        self._run = run
        self._required, self._optional = list(required), list(optional)
        self._rollouts_every = rollouts_every

    def start(self) -> None:
        """Start each; when one fails, close those already open and raise."""
        started: list[Sink] = []
        for sink in [*self._required, *self._optional]:
            try:
                sink.start(self._run)
            except BaseException:
                for other in reversed(started):
                    other.close()
                raise
            started.append(sink)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of one step, or of an evaluation after it (keys ``eval/…``)."""
        self._each(lambda sink: sink.log(step, values))

    def rollouts(self, step: int, groups: Sequence[RolloutGroup], *, evaluation: bool = False) -> None:
        """Samples of one step, every ``logging.rollouts_every`` steps; those of evaluations always, unless it is 0."""
        if self._rollouts_every and (evaluation or step % self._rollouts_every == 0):
            self._each(lambda sink: sink.rollouts(step, groups, evaluation=evaluation))

    def message(self, text: str) -> None:
        """Something the user should read."""
        self._each(lambda sink: sink.message(text))

    def close(self) -> None:
        """Flush and release all; may come twice."""
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        """Required sinks raise; an optional one that fails is reported once and left out from then on."""
        for sink in self._required:
            call(sink)
        for sink in list(self._optional):
            try:
                call(sink)
            except PosttrainError:
                raise
            except Exception as error:
                self._optional.remove(sink)
                text = f"{type(sink).__name__} failed and is switched off, the run goes on: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=3)


def open_sinks(config: LoggingConfig, run: RunDir, total_steps: int, *, first_step: int = 0) -> Sinks:
    """Start every destination the configuration asks for. ``first_step``: steps already done in a resumed run."""
    required: list[Sink] = [FileSink()]
    if config.console != "off":
        required.append(ConsoleSink(total_steps, first_step, live=config.console == "auto", clock=time.monotonic))
    optional: list[Sink] = []
    if config.tensorboard:
        optional.append(TensorboardSink(first_step))
    if config.wandb_project:
        optional.append(WandbSink(config.wandb_project, config.wandb_mode))
    sinks = Sinks(run, required, optional, config.rollouts_every)
    sinks.start()
    return sinks
