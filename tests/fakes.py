"""In-memory stand-ins for the sampler and the learner, and small things to feed the loop with.

Both keep ``events``, in order, in one list that they may share; ``pauses`` lets other tasks in at every call, and
``before`` runs a hook (await an event, raise, ask for a stop) before a call does anything.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.rl.config import Config, LoggingConfig, from_settings
from posttrain.rl.data import PromptSource
from posttrain.rl.fingerprint import fingerprint
from posttrain.rl.metrics import Max, Mean, Metric, Sum
from posttrain.rl.rewards import Rubric
from posttrain.rl.rewards.alerts import Alerts
from posttrain.rl.run_dir import RunDir
from posttrain.rl.service import state
from posttrain.rl.service.controller import Controller, Parts
from posttrain.rl.service.evaluation import Evaluator
from posttrain.rl.service.learning import LearningStep
from posttrain.rl.service.production import Producer
from posttrain.rl.sinks import open_sinks
from posttrain.rl.types import (
    Adapter,
    Completion,
    OptimParams,
    OptimResult,
    Prompt,
    Publication,
    Rollout,
    RolloutGroup,
    SamplingParams,
    Scores,
    TrainBatch,
)

Event = tuple[Any, ...]
Hook = Callable[[str], Awaitable[None]]
STOP_ID = 0


class _Fake:
    """What both have in common."""

    def __init__(self, events: list[Event] | None = None, pauses: random.Random | None = None) -> None:
        self.events: list[Event] = [] if events is None else events
        self.before: Hook | None = None
        self.closed = 0
        self._pauses = pauses

    async def _call(self, name: str) -> None:
        if self.before is not None:
            await self.before(name)
        for _ in range(self._pauses.randrange(12) if self._pauses else 0):
            await asyncio.sleep(0)

    async def close(self) -> None:
        self.closed += 1

    @property
    def members(self) -> tuple[Any]:
        return (self,)


class FakeSampler(_Fake):
    """Sample ``i`` of a prompt under version ``v`` is the text ``"<prompt id>/<i>@<v>"``, with one to three tokens."""

    def __init__(self, events: list[Event] | None = None, pauses: random.Random | None = None) -> None:
        super().__init__(events, pauses)
        self.version = -1
        self.awake = True
        self.corrupt = False
        """Report another fingerprint than that of what was loaded."""
        self.open_streams = 0
        """Streams that were begun and neither ended nor closed."""

    async def sample(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
        drawn = {index: completions async for index, completions in self.stream(prompts, n, params)}
        return [drawn[index] for index in range(len(prompts))]

    async def stream(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams
    ) -> AsyncIterator[tuple[int, list[Completion]]]:
        """``before`` hears ``sample`` once and ``group`` for each; ``pauses`` shuffle the groups too."""
        assert self.awake, "asked to sample while asleep"
        version = self.version
        self.events.append(("sample", tuple(prompt.id for prompt in prompts), version))
        self.open_streams += 1
        try:
            await self._call("sample")
            order = list(range(len(prompts)))
            if self._pauses:
                self._pauses.shuffle(order)
            for index in order:
                await self._call("group")
                assert self.awake and self.version == version, "put to sleep, or given other weights, inside a batch"
                name = prompts[index].id
                yield index, [completion(f"{name}/{i}@{version}", version, 1 + i % 3) for i in range(n)]
        finally:
            self.open_streams -= 1

    async def load_adapter(self, adapter: Publication) -> str:
        assert isinstance(adapter, Adapter)
        await self._call("load_adapter")
        self.version = adapter.policy_version
        self.events.append(("load", self.version))
        return "something else" if self.corrupt else fingerprint(adapter.tensors)

    async def sleep(self) -> None:
        await self._call("sleep")
        self.awake = False
        self.events.append(("sleep",))

    async def wake(self) -> None:
        await self._call("wake")
        self.awake = True
        self.events.append(("wake",))


class FakeLearner(_Fake):
    """Its one weight is its version; old logprobs are minus the version that scored them."""

    def __init__(self, events: list[Event] | None = None, pauses: random.Random | None = None) -> None:
        super().__init__(events, pauses)
        self.version = 0
        self.weight = 0.0
        self.moves = True
        """Whether an optimizer step changes the weight."""
        self.base = "base"
        self.figures: dict[str, Metric] = {}
        """Added to what ``forward_backward`` reports."""
        self.batches: list[list[TrainBatch]] = []
        """What ``forward_backward`` was given."""
        self.params: list[OptimParams] = []
        """What ``optim_step`` was given."""
        self.resets = 0

    async def score(self, batches: Sequence[TrainBatch], *, reference: bool = False) -> list[Scores]:
        self.events.append(("reference" if reference else "score", self.version))
        await self._call("score")
        value = -100.0 if reference else -float(self.version)
        return [Scores(torch.full(b.input_ids.shape, value), torch.ones(b.input_ids.shape)) for b in batches]

    async def forward_backward(self, batches: Sequence[TrainBatch], algorithm: Any) -> dict[str, Metric]:
        self.events.append(("train", self.version))
        self.batches.append(list(batches))
        await self._call("forward_backward")
        return {
            "loss/total": Sum(float(self.version)),
            "policy/ratio_mean": Mean(1.0),
            "policy/ratio_max": Max(1.0),
            **self.figures,
        }

    async def optim_step(self, params: OptimParams) -> OptimResult:
        await self._call("optim_step")
        self.params.append(params)
        self.version += 1
        self.weight += self.moves
        self.events.append(("step", self.version))
        return OptimResult(self.version, 0.5)

    async def reset_optimizer(self) -> None:
        await self._call("reset_optimizer")
        self.resets += 1

    async def export_adapter(self) -> Adapter:
        await self._call("export_adapter")
        return Adapter(self.version, "lora", {"weight": torch.tensor([self.weight])}, {})

    async def publish_adapter(self) -> Adapter:
        return await self.export_adapter()

    async def clear_gradients(self) -> None:
        await self._call("clear_gradients")
        self.events.append(("clear", self.version))

    async def checksum(self) -> str:
        await self._call("checksum")
        return self.base

    async def save(self, folder: Path) -> None:
        await self._call("save")
        self.events.append(("save", folder.name.removeprefix(".partial_"), self.version))
        (folder / "learner.json").write_text(json.dumps([self.version, self.weight]))

    async def load(self, folder: Path) -> None:
        await self._call("load")
        self.version, self.weight = json.loads((folder / "learner.json").read_text())

    async def release_memory(self) -> None:
        await self._call("release_memory")
        self.events.append(("release", self.version))

    async def memory(self) -> Mapping[str, float]:
        await self._call("memory")
        return {"peak_memory_gib": 1.0}


class Loop:
    """A controller over fakes in a real run directory. ``after`` goes on with the run of another, as a resume does."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        *,
        reward: Callable[..., Any] | None = None,
        pauses: random.Random | None = None,
        warm_start: Callable[[FakeLearner], Awaitable[dict[str, float]]] | None = None,
        rows: int = 7,
    ) -> None:
        resumed = (folder / "run" / "config.toml").exists()
        self.config = config
        self.events: list[Event] = []
        self.sampler, self.learner = FakeSampler(self.events, pauses), FakeLearner(self.events, pauses)
        self.run_dir = RunDir.open(folder / "run") if resumed else RunDir.create(folder, "run", config.tree())
        self.newest = self.run_dir.latest_checkpoint()
        self.progress = state.read(self.newest[1]) if self.newest else state.Progress()
        if resumed:
            self.run_dir.truncate_after(self.progress.step if self.newest else -1)
        self.rubric = Rubric([reward or numbered])
        source = PromptSource(questions(rows), config.data, config.seed, encode=encode)
        if self.progress.cursor:
            source.restore(self.progress.cursor)
        self.sinks = open_sinks(LoggingConfig(console="off"), self.run_dir, config.steps)
        evaluator = None
        if config.evaluation.every:
            held_out = [prompt(f"eval-{index}") for index in range(2)]
            evaluator = Evaluator(config, self.sampler, self.rubric, held_out, (STOP_ID,))
        parts = Parts(
            config=config,
            run=self.run_dir,
            sampler=self.sampler,
            learner=self.learner,
            producer=Producer(config, self.sampler, self.rubric, source, (STOP_ID,)),
            learning=LearningStep(config, self.learner, lambda step: 0.1 * step, self.sinks.message),
            sinks=self.sinks,
            alerts=Alerts(self.rubric.combining.weights(0), config.rollout.group_size, self.run_dir.metrics()),
            evaluator=evaluator,
            warm_start=(lambda: warm_start(self.learner)) if warm_start else None,
        )
        self.controller = Controller(parts, self.progress)

    async def run(self) -> None:
        """To the end, a stop or a failure; a loop that hangs fails after ten seconds."""
        if self.newest:
            await self.learner.load(self.newest[1])
        await asyncio.wait_for(self.controller.run(), timeout=10)

    def rows(self) -> list[dict[str, Any]]:
        """Lines of metrics, without what depends on the clock."""
        rows = self.run_dir.metrics()
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]

    def messages(self) -> list[str]:
        """What the run had to say."""
        file = self.run_dir.messages_file
        return [line.split(" ", 1)[1] for line in file.read_text().splitlines()] if file.exists() else []

    def checkpoints(self) -> list[str]:
        folder = self.run_dir.checkpoints_dir
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def config(**settings: Any) -> Config:
    """Two prompts of three samples a step, four steps, saved at the end only; ``settings`` as in ``rl.train``."""
    small = {"prompts_per_step": 2, "group_size": 3, "max_tokens": 4, "max_prompt_tokens": 8, "steps": 4}
    small |= {"checkpoint": {"every": 0}}
    if settings.get("evaluation"):
        small["data"] = {"eval_rows": 1}
    return from_settings(model="no/model", **{**small, **settings})


def questions(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"q{index}", "answer": index} for index in range(count)]


def encode(prompt: Prompt) -> Prompt:
    assert isinstance(prompt.source, str)
    return Prompt(prompt.id, prompt.source, prompt.columns, tuple(prompt.source.encode()))


def prompt(name: str, **columns: Any) -> Prompt:
    return encode(Prompt(name, name, columns))


def completion(text: str, version: int = 0, tokens: int = 2, finish_reason: Any = "stop") -> Completion:
    """``tokens`` tokens, the last of them the stop token, each with logprob −0.5."""
    return Completion((7,) * (tokens - 1) + (STOP_ID,), (-0.5,) * tokens, text, finish_reason, version)


def group(name: str, rewards: Sequence[float], version: int = 0) -> RolloutGroup:
    """One rollout a reward."""
    rollouts = [
        Rollout(
            completion(f"{name}/{index}", version, 1 + index),
            {"numbered": reward},
            reward,
            counted={"numbered": reward},
            weights={"numbered": 1.0},
        )
        for index, reward in enumerate(rewards)
    ]
    return RolloutGroup(prompt(name), rollouts)


def numbered(completion: str) -> float:
    """The sample's index in its group, of a fake sampler's text: never all equal."""
    return float(completion.split("/")[-1].split("@")[0])
