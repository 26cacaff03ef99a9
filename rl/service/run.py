"""From a configuration to a result: gather, check, then train or evaluate."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.rl.config import Config
from posttrain.rl.errors import ConfigError, PosttrainError
from posttrain.rl.run_dir import RunDir
from posttrain.rl.service import inputs
from posttrain.rl.service.blueprint import check_installed
from posttrain.rl.service.inputs import Given, Inputs
from posttrain.rl.service.interrupts import Stops, run_to_end
from posttrain.rl.service.placement import place
from posttrain.rl.service.random_model import materialize
from posttrain.rl.service.training import Training, chat_encoder, make_evaluator
from posttrain.rl.service.weight_sync import publish


@dataclass(slots=True, frozen=True)
class RunResult:
    """A finished run."""

    run_dir: Path
    metrics: list[dict[str, Any]]
    """One dict a step, as in ``metrics.jsonl``."""
    checkpoint: Path
    """Newest checkpoint: a LoRA adapter that peft loads, or a full model that transformers loads."""
    plot: Path | None
    """The reward curve, where ``logging.plot`` asked for it."""


def train(
    config: Config, *, resume: Path | None = None, base: Path | None = None, given: Given | None = None
) -> RunResult:
    """Train as ``config`` says, or go on with the run ``resume``; relative paths in ``config`` start at ``base``.

    Ctrl-C saves a checkpoint and raises ``KeyboardInterrupt``; a second one stops at once. Raises ``PosttrainError``
    for anything the user can put right, before a model is loaded wherever that can be known.
    """
    given = given or Given()
    _quiet_libraries(config)
    gathered = inputs.gather(config, given, base)
    run = RunDir.open(resume) if resume else None
    source = _source(config, base)
    check_installed(config)
    if source is not None:
        _preflight(config, source)
    if run is None:
        run = RunDir.create(config.output_dir, config.run_name, config.tree(), base=base)
    with run.lock(), closing(gathered.rubric):
        source = source or _random_model(config, run, new=not resume)
        interrupted = run_to_end(Training(config, run, gathered, source, resumes=bool(resume)).run)
    if interrupted:
        raise KeyboardInterrupt
    newest = run.latest_checkpoint()
    assert newest is not None, "a run that ended has a checkpoint"
    return RunResult(run.path, run.metrics(), newest[1], run.plot_file if config.logging.plot else None)


def evaluate(config: Config, *, checkpoint: Path | None = None, base: Path | None = None) -> dict[str, float]:
    """Figures (``eval/…``) of a checkpoint, or of the untrained model, on the held-out rows."""
    gathered = inputs.gather(config, Given(), base)
    if gathered.eval_rows is None:
        raise ConfigError("nothing to evaluate on: set data.eval_split, data.eval_dataset or data.eval_rows")
    source = _source(config, base)
    if source is None:
        if checkpoint is None:
            raise ConfigError("a random model exists only inside its run: give the run to evaluate")
        source = str(RunDir.find(checkpoint)[0].model_dir)
    with closing(gathered.rubric):
        return run_to_end(partial(_evaluate, config, gathered, source, checkpoint))


def _quiet_libraries(config: Config) -> None:
    """transformers' progress bars would tear the live display; they stay only where there is no console of ours."""
    if config.logging.console != "off":
        from transformers.utils import logging

        logging.disable_progress_bar()


def _source(config: Config, base: Path | None) -> str | None:
    """Folder or hub name of the model; ``None`` for a random one, which is written into the run first."""
    name = config.model.name
    if name is None:
        return None
    local = ((base or Path.cwd()) / Path(name).expanduser()).resolve()
    if local.is_dir():
        return str(local)
    if name.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"model.name: no folder {local}")
    return name


def _random_model(config: Config, run: RunDir, *, new: bool) -> str:
    """The folder of the run's own model; a new run whose model cannot be built leaves no folder behind."""
    try:
        return materialize(config.model, run.model_dir)
    except PosttrainError:
        if new:
            shutil.rmtree(run.path)
        raise


def _preflight(config: Config, source: str) -> None:
    """What can be known about a model before it is loaded: that it is there, has a tokenizer, and fits."""
    from posttrain.rl.memory import check_fits

    chat_encoder(config, source)
    check_fits(config.model_copy(update={"model": config.model.model_copy(update={"name": source})}))


async def _evaluate(
    config: Config, gathered: Inputs, source: str, checkpoint: Path | None, stops: Stops
) -> dict[str, float]:
    encoder = chat_encoder(config, source)
    async with place(config, source, checkpoint or Path(source)) as placement:
        if checkpoint is not None:
            await placement.learner.load(checkpoint)
        await publish(placement.learner, placement.sampler)
        await placement.learner.release_memory()
        await placement.sampler.wake()  # waking what is awake does nothing
        figures, _ = await make_evaluator(config, gathered, encoder, placement.sampler).evaluate()
    return figures
