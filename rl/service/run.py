"""One run from configuration to result: gather, check, place, loop, plot."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.rl.config import Config
from posttrain.rl.data import PromptSource, make_prompts
from posttrain.rl.errors import ConfigError, PosttrainError
from posttrain.rl.run_dir import RunDir
from posttrain.rl.service import inputs, state
from posttrain.rl.service.blueprint import check_installed
from posttrain.rl.service.controller import Controller, Parts
from posttrain.rl.service.evaluation import Evaluator
from posttrain.rl.service.inputs import Given, Inputs
from posttrain.rl.service.interrupts import Stops, run_to_end
from posttrain.rl.service.learning import LearningStep
from posttrain.rl.service.placement import place
from posttrain.rl.service.production import Producer
from posttrain.rl.service.random_model import materialize
from posttrain.rl.service.warm_start import warm_start
from posttrain.rl.service.weight_sync import publish
from posttrain.rl.sinks import Sinks, open_sinks

if TYPE_CHECKING:
    from posttrain.rl.service.protocols import Learner, Sampler
    from posttrain.rollout.chat import ChatEncoder


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
    with run.lock():
        source = source or _random_model(config, run, new=not resume)
        interrupted = run_to_end(partial(_train, config, run, gathered, source, bool(resume)))
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

    _encoder(config, source)
    check_fits(config.model_copy(update={"model": config.model.model_copy(update={"name": source})}))


def _encoder(config: Config, source: str) -> ChatEncoder:
    from posttrain.rollout.chat import load_encoder

    return load_encoder(source, config.model, config.data, config.rollout)


async def _train(config: Config, run: RunDir, gathered: Inputs, source: str, resume: bool, stops: Stops) -> bool:
    """Build every part and run the loop; returns whether it was stopped."""
    from posttrain.trainer.optim import learning_rate_at

    progress = _progress(run) if resume else state.Progress()
    encoder = _encoder(config, source)
    prompts = PromptSource(gathered.rows, config.data, config.seed, encode=encoder.encode)
    if progress.cursor:
        prompts.restore(progress.cursor)
    sinks = open_sinks(config.logging, run, config.steps, first_step=progress.step)
    try:
        async with place(config, source) as placement:
            sampler, learner = placement.sampler, placement.learner
            if progress.resumed:
                await learner.load(run.checkpoint_dir(progress.step))
            if resume:  # only now is it known that what was changed fits the checkpoint
                run.write_config(config.tree())
            parts = Parts(
                config=config,
                run=run,
                sampler=sampler,
                learner=learner,
                producer=Producer(config, sampler, gathered.rubric, prompts, encoder.stop_token_ids),
                learning=LearningStep(
                    config,
                    learner,
                    gathered.rubric.weights,
                    lambda step: learning_rate_at(step - 1, config.steps, config.trainer),
                    sinks.message,
                ),
                sinks=sinks,
                evaluator=_evaluator(config, gathered, encoder, sampler),
                warm_start=_warm_start(config, gathered, encoder, learner, sinks),
            )
            controller = Controller(parts, progress)
            stops.connect(controller.request_stop, sinks.message)
            await controller.run()
        if config.logging.plot and run.metrics():
            from posttrain.rl.plot import write_reward_plot

            sinks.message(f"reward curve: {write_reward_plot(run)}")
        sinks.message(f"run: {run.path}")
    finally:
        sinks.close()
    return stops.requested


def _progress(run: RunDir) -> state.Progress:
    """Where a run to be resumed stands; metrics and samples of later steps are forgotten."""
    newest = run.latest_checkpoint()
    progress = state.read(newest[1]) if newest else state.Progress()
    run.truncate_after(progress.step if newest else -1)
    return progress


def _evaluator(config: Config, gathered: Inputs, encoder: ChatEncoder, sampler: Sampler) -> Evaluator | None:
    if not config.evaluation.every or gathered.eval_rows is None:
        return None
    return _make_evaluator(config, gathered, encoder, sampler)


def _make_evaluator(config: Config, gathered: Inputs, encoder: ChatEncoder, sampler: Sampler) -> Evaluator:
    assert gathered.eval_rows is not None
    prompts = [encoder.encode(p) for p in make_prompts(gathered.eval_rows, config.data)]
    fitting = [p for p in prompts if len(p.prompt_ids) <= config.data.max_prompt_tokens]
    if not fitting:
        raise ConfigError(
            f"every held-out prompt is longer than data.max_prompt_tokens = {config.data.max_prompt_tokens}"
        )
    return Evaluator(config, sampler, gathered.rubric, fitting, encoder.stop_token_ids)


def _warm_start(
    config: Config, gathered: Inputs, encoder: ChatEncoder, learner: Learner, sinks: Sinks
) -> Callable[[], Coroutine[Any, Any, dict[str, float]]] | None:
    settings = config.warm_start
    if settings is None:
        return None
    examples = [
        (encoder.encode(prompt).prompt_ids, encoder.encode_completion(text)) for prompt, text in gathered.demonstrations
    ]
    return partial(warm_start, config, settings, learner, examples, sinks.message)


async def _evaluate(
    config: Config, gathered: Inputs, source: str, checkpoint: Path | None, stops: Stops
) -> dict[str, float]:
    encoder = _encoder(config, source)
    async with place(config, source) as placement:
        if checkpoint is not None:
            await placement.learner.load(checkpoint)
        await publish(placement.learner, placement.sampler)
        figures, _ = await _make_evaluator(config, gathered, encoder, placement.sampler).evaluate()
    return figures
