"""Out of memory: the update is repeated on smaller micro-batches and ends where it would have, with a real trainer."""

from __future__ import annotations

import pytest
import torch

from posttrain.rl import metrics
from posttrain.rl.batching import plan_supervised
from posttrain.rl.config import TrainerConfig, WarmStartConfig
from posttrain.rl.errors import OutOfMemory
from posttrain.rl.metrics import Max, Mean
from posttrain.rl.repack import repack
from posttrain.rl.service.learning import LearningStep
from posttrain.rl.service.micro_batches import MicroBatchBudget
from posttrain.rl.service.production import Batch
from posttrain.rl.service.warm_start import warm_start
from posttrain.rl.timeline import Timeline
from posttrain.rl.types import Completion, Prompt, Rollout, RolloutGroup
from tests.fakes import FakeLearner, config
from tests.rl.packed_step import groups as random_groups
from tests.trainer.tiny import keep_norms_exact, save_tiny, trainer_of, wake_adapter


def cost(batch) -> int:
    """Loss tokens, and the tokens of every distinct prompt."""
    parts = zip(*(column.split(batch.cu_seqlens.diff().tolist()) for column in (batch.input_ids, batch.loss_mask)))
    return int(batch.loss_mask.sum()) + sum(map(len, {tuple(ids[~mask].tolist()) for ids, mask in parts}))


class Crowded(FakeLearner):
    """A real trainer whose GPU is full at ``room`` tokens, prompts counted once. The micro-batches before have left
    their gradients by then, and the first of them counts double: if it were not cleared, or repeated, everything would
    differ.
    """

    def __init__(self, folder, room: float) -> None:
        super().__init__()
        self.trainer = trainer_of(folder, optimizer="adamw")
        wake_adapter(self.trainer)
        keep_norms_exact(self.trainer._causal_lm)
        self.room = room
        self.failures: list[str] = []

    def _check(self, batch, what: str) -> None:
        if cost(batch) > self.room:
            self.failures.append(what)
            raise OutOfMemory(f"no room for {cost(batch)} tokens")

    async def score(self, batches, *, reference=False):
        for batch in batches:
            self._check(batch, "reference" if reference else "score")
        return self.trainer.score(batches, reference)

    async def forward_backward(self, batches, algorithm):
        self.batches.append(list(batches))
        parts = []
        for batch in sorted(batches, key=lambda batch: len(batch.input_ids)):
            self._check(batch, "forward_backward")
            parts.append(self.trainer.forward_backward([batch], algorithm))
        return metrics.merge(parts)

    async def clear_gradients(self):
        self.events.append(("clear",))
        self.trainer.clear_gradients()

    async def optim_step(self, params):
        return self.trainer.optim_step(params)

    async def reset_optimizer(self):
        self.trainer.reset_optimizer()

    def adapter(self) -> dict[str, torch.Tensor]:
        return dict(self.trainer.export_adapter().tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def batch() -> Batch:
    """24 completions of 1 to 40 tokens in uneven groups, as a sampler of some older policy drew them."""
    shortened = []
    for group in random_groups():
        rollouts = [
            Rollout(
                Completion(
                    r.completion.completion_ids[:40], r.completion.rollout_logprobs[:40], "", "stop", policy_version=0
                ),
                {"a": r.reward},
                r.reward,
                counted={"a": r.reward},
                weights={"a": 1.0},
            )
            for r in group.rollouts
        ]
        shortened.append(RolloutGroup(Prompt(group.prompt.id, "", {}, group.prompt.prompt_ids), rollouts))
    return Batch(1, shortened)


async def train(learner: Crowded, said: list[str], **settings) -> tuple[dict[str, float], LearningStep]:
    chosen = config(max_tokens=40, prompts_per_step=6, **settings)
    learning = LearningStep(chosen, learner, lambda step: 1e-2, said.append)
    figures = await learning.train(batch(), Timeline(), policy_version=0, rescore=True)
    return metrics.values(figures), learning


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-10)


SETTINGS = [
    {"algorithm": "grpo"},
    {"algorithm": "gspo", "updates_per_batch": 2},
    {"algorithm": {"name": "grpo", "kl_coef": 0.1, "top_entropy": 0.5}, "epochs_per_batch": 2},
    {"algorithm": {"name": "dr_grpo"}, "updates_per_batch": 3, "epochs_per_batch": 2},
]


@pytest.mark.parametrize("room", [180, 120, 48], ids=lambda room: f"room for {room}")
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
async def test_a_halved_update_ends_where_the_undisturbed_one_does(folder, settings, room) -> None:
    free, full = Crowded(folder, float("inf")), Crowded(folder, room)
    expected, _ = await train(free, [], **settings)
    said: list[str] = []
    figures, learning = await train(full, said, **settings)
    assert full.failures, "it did run out of memory"
    assert len(said) == len(full.failures) == sum(event == ("clear",) for event in full.events)
    assert_equal(full.adapter(), free.adapter())
    assert figures.keys() == expected.keys()
    for key, value in expected.items():
        assert figures[key] == pytest.approx(value, rel=1e-9, abs=1e-10), key
    assert learning._budget.tokens <= room


@pytest.mark.parametrize("what", ["score", "reference", "forward_backward"])
async def test_wherever_it_runs_out(folder, what) -> None:
    class Once(Crowded):
        """Full at the first ``what`` alone."""

        def _check(self, batch, at: str) -> None:
            self.room = 100 if at == what and not self.failures else float("inf")
            super()._check(batch, at)

    settings = {"algorithm": {"name": "grpo", "kl_coef": 0.1}, "updates_per_batch": 2}
    free, once = Crowded(folder, float("inf")), Once(folder, 0)
    await train(free, [], **settings)
    said: list[str] = []
    await train(once, said, **settings)
    assert once.failures == [what] and len(said) == 1
    assert_equal(once.adapter(), free.adapter())


async def test_later_updates_and_steps_begin_with_the_smaller_budget(folder) -> None:
    learner, said = Crowded(folder, 120), []
    _, learning = await train(learner, said, updates_per_batch=2)
    failures = len(learner.failures)
    await learning.train(batch(), Timeline(), policy_version=2, rescore=True)
    assert len(learner.failures) == failures == len(said)
    assert max(map(cost, learner.batches[-1])) <= learning._budget.tokens <= 120
    assert {b.num_micro_batches for b in learner.batches[-1]} == {len(learner.batches[-1])}


async def test_the_warning_names_both_budgets_and_the_setting(folder) -> None:
    learner, said = Crowded(folder, 400), []
    await train(learner, said)
    total = cost(repack(learner.batches[-1], 10**6)[0])
    assert said[0].startswith(
        f"out of memory on micro-batches of up to {total} tokens: the update is repeated with {total // 2} tokens in "
        f"place of 16384, and so is the rest of the run. Set trainer.micro_batch_tokens = {total // 2} to begin with"
    )
    assert said[0].endswith(f"(no room for {total} tokens)")


async def test_a_single_sequence_that_does_not_fit_is_an_error_with_advice(folder) -> None:
    learner = Crowded(folder, 20)
    with pytest.raises(
        OutOfMemory, match=r"a single sequence does not fit .* \(the longest has 4\d tokens\)"
    ) as caught:
        await train(learner, [])
    for advice in ("trainer.activation_checkpointing", "rollout.max_tokens", "gpu_memory_gib", "no room for"):
        assert advice in str(caught.value)
    assert isinstance(caught.value.__cause__, OutOfMemory)


async def test_earlier_updates_of_the_step_stay(folder) -> None:
    """Room runs out before the second update: the optimizer steps once an update, never again for the first."""

    class Later(Crowded):
        async def optim_step(self, params):
            self.room = 60.0
            return await super().optim_step(params)

    free, later = Crowded(folder, float("inf")), Later(folder, float("inf"))
    await train(free, [], updates_per_batch=2)
    await train(later, [], updates_per_batch=2)
    assert later.trainer.policy_version == free.trainer.policy_version == 2
    assert set(later.failures) == {"forward_backward"}
    assert_equal(later.adapter(), free.adapter())


async def test_the_warm_start_goes_on_too(folder) -> None:
    examples = [((5, index), (7, 8, index)) for index in range(10)]
    settings = WarmStartConfig(steps=4, batch_size=6, learning_rate=1e-2)
    free, full, said = Crowded(folder, float("inf")), Crowded(folder, 12), []
    expected = await warm_start(config(), settings, free, examples, lambda text: None)
    figures = await warm_start(config(), settings, full, examples, said.append)
    assert full.failures == ["forward_backward", "forward_backward"], "30 tokens, then 15; 7 fit"
    assert figures["loss/warm_start"] == pytest.approx(expected["loss/warm_start"], rel=1e-10)
    assert_equal(full.adapter(), free.adapter())
    assert sum("out of memory" in text for text in said) == 2


async def test_what_fits_is_left_as_it_is() -> None:
    learner, said, seen = FakeLearner(), [], []
    budget = MicroBatchBudget(learner, TrainerConfig(), said.append)
    made = plan_supervised([((1, 2), (3, 4, 5))] * 3, 16384, 4)

    async def work(batches):
        seen.append(batches)
        return {"policy/ratio_max": Max(1.0), "x": Mean(2.0)}

    assert await budget.run(made, work) == {"policy/ratio_max": Max(1.0), "x": Mean(2.0)}
    assert seen[0] is made and said == [] and budget.tokens == 16384


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "trainer.activation_checkpointing = true"),
        ({"activation_checkpointing": True}, "trainer.offload_activations = true"),
        ({"activation_checkpointing": True, "offload_activations": True}, None),
    ],
)
async def test_the_advice_is_the_next_setting_that_is_not_there_yet(folder, settings, advice) -> None:
    learner, said = Crowded(folder, 20), []
    budget = MicroBatchBudget(learner, TrainerConfig(**settings), said.append)
    batches = plan_supervised([([1], [2] * 39), ([1], [3] * 39)], 10**6, 40)
    with pytest.raises(OutOfMemory, match="does not fit") as caught:
        await budget.run(batches, lambda parts: learner.forward_backward(parts, None))
    for message in (str(caught.value), said[0]):
        assert [name for name in ("activation_checkpointing", "offload_activations") if name in message] == (
            [advice.split(".")[1].split(" ")[0]] if advice else []
        )
