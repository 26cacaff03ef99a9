"""One run: place sampler and trainer, put the parts of the loop together, run it, and again where one of them died."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from posttrain.rl.data import PromptSource, make_prompts
from posttrain.rl.errors import ActorDied, ConfigError
from posttrain.rl.rewards.alerts import Alerts
from posttrain.rl.service import state
from posttrain.rl.service.controller import Controller, Parts
from posttrain.rl.service.evaluation import Evaluator
from posttrain.rl.service.handles import SamplerOutOfMemory
from posttrain.rl.service.learning import LearningStep
from posttrain.rl.service.placement import place
from posttrain.rl.service.production import Producer
from posttrain.rl.service.restarts import Restarts
from posttrain.rl.service.warm_start import warm_start
from posttrain.rl.sinks import Sinks, open_sinks

if TYPE_CHECKING:
    from posttrain.rl.config import Config
    from posttrain.rl.run_dir import RunDir
    from posttrain.rl.service.inputs import Inputs
    from posttrain.rl.service.interrupts import Stops
    from posttrain.rl.service.placement import Placement
    from posttrain.rl.service.protocols import Learner, Sampler
    from posttrain.rollout.chat import ChatEncoder


class Training:
    """A run from where it stands to its end."""

    def __init__(self, config: Config, run: RunDir, gathered: Inputs, source: str, *, resumes: bool) -> None:
        """``source``: the model, hub name or folder; ``resumes``: go on from the run's last checkpoint."""
        self._config, self._run, self._gathered, self._source = config, run, gathered, source
        self._resumes = resumes
        self._encoder = chat_encoder(config, source)
        self._progress = state.Progress()
        self._prompts: PromptSource
        self._sinks: Sinks

    async def run(self, stops: Stops) -> bool:
        """Train; returns whether it was stopped before its end."""
        restarts = Restarts(self._config.max_restarts, self._run)
        self._open(from_checkpoint=self._resumes)
        try:
            async with place(self._config, self._source, self._run.path) as placement:
                failure = await self._attempt(placement, stops)
                while failure is not None and not stops.requested:
                    count = restarts.allow(failure)
                    self._report(failure, placement, count)
                    self._sinks.close()
                    self._open(from_checkpoint=True)
                    failure = await self._attempt(placement, stops, failure)
            if self._config.logging.plot and self._run.metrics():
                from posttrain.rl.plot import write_reward_plot

                self._sinks.message(f"reward curve: {write_reward_plot(self._run)}")
            self._sinks.message(f"run: {self._run.path}")
        finally:
            self._sinks.close()
        return stops.requested

    def _open(self, *, from_checkpoint: bool) -> None:
        """Find out where the run stands; metrics and samples of later steps are forgotten."""
        if from_checkpoint:
            newest = self._run.latest_checkpoint()
            self._progress = state.read(newest[1]) if newest else state.Progress()
            self._run.truncate_after(self._progress.step if newest else -1)
        config, progress = self._config, self._progress
        self._prompts = PromptSource(self._gathered.rows, config.data, config.seed, encode=self._encoder.encode)
        if progress.cursor:
            self._prompts.restore(progress.cursor)
        self._sinks = open_sinks(config.logging, self._run, config.steps, first_step=progress.step)

    async def _attempt(
        self, placement: Placement, stops: Stops, failure: ActorDied | SamplerOutOfMemory | None = None
    ) -> ActorDied | SamplerOutOfMemory | None:
        """Run the loop to its end, after ``failure`` with what was lost rebuilt; returns what ended it early."""
        try:
            if failure is not None:
                await placement.recover(failure)
            if self._progress.resumed:
                await placement.learner.load(self._run.checkpoint_dir(self._progress.step))
            if self._resumes:  # only now is it known that what was changed fits the checkpoint
                self._run.write_config(self._config.tree())
            controller = Controller(self._parts(placement.sampler, placement.learner), self._progress)
            stops.connect(controller.request_stop, self._sinks.message)
            await controller.run()
        except (ActorDied, SamplerOutOfMemory) as error:
            # Without the frames it came through: they hold what the lost part was working on.
            error.__traceback__ = error.__context__ = None
            return error
        return None

    def _report(self, failure: ActorDied | SamplerOutOfMemory, placement: Placement, count: str) -> None:
        newest = self._run.latest_checkpoint()
        whence = f"the checkpoint of step {newest[0]}" if newest else "its start, there is no checkpoint yet"
        self._sinks.message(
            f"warning: {failure}; {placement.remedy(failure)}, and the run goes on from {whence} ({count})"
        )

    def _parts(self, sampler: Sampler, learner: Learner) -> Parts:
        """What the controller drives."""
        from posttrain.trainer.optim import learning_rate_at

        config, rubric = self._config, self._gathered.rubric
        evaluated = config.evaluation.every and self._gathered.eval_rows is not None
        return Parts(
            config=config,
            run=self._run,
            sampler=sampler,
            learner=learner,
            producer=Producer(config, sampler, rubric, self._prompts, self._encoder.stop_token_ids),
            learning=LearningStep(
                config,
                learner,
                lambda step: learning_rate_at(step - 1, config.steps, config.trainer),
                self._sinks.message,
            ),
            sinks=self._sinks,
            alerts=Alerts(rubric.combining.weights(0), config.rollout.group_size, self._run.metrics()),
            evaluator=make_evaluator(config, self._gathered, self._encoder, sampler) if evaluated else None,
            warm_start=self._warm_start(learner),
        )

    def _warm_start(self, learner: Learner) -> Callable[[], Awaitable[dict[str, float]]] | None:
        settings, encoder = self._config.warm_start, self._encoder
        if settings is None:
            return None
        examples = [
            (encoder.encode(prompt).prompt_ids, encoder.encode_completion(text))
            for prompt, text in self._gathered.demonstrations
        ]
        return partial(warm_start, self._config, settings, learner, examples, self._sinks.message)


def chat_encoder(config: Config, source: str) -> ChatEncoder:
    """The model's tokenizer and chat template."""
    from posttrain.rollout.chat import load_encoder

    return load_encoder(source, config.model, config.data, config.rollout)


def make_evaluator(config: Config, gathered: Inputs, encoder: ChatEncoder, sampler: Sampler) -> Evaluator:
    """Over the held-out rows, which must be there."""
    assert gathered.eval_rows is not None
    prompts = [encoder.encode(p) for p in make_prompts(gathered.eval_rows, config.data)]
    fitting = [p for p in prompts if len(p.prompt_ids) <= config.data.max_prompt_tokens]
    if not fitting:
        raise ConfigError(
            f"every held-out prompt is longer than data.max_prompt_tokens = {config.data.max_prompt_tokens}"
        )
    return Evaluator(config, sampler, gathered.rubric, fitting, encoder.stop_token_ids)
