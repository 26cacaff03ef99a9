"""The loop over fakes: order, staleness, schedules, failures, stops and resumes. No clock decides anything."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading

import pytest

from posttrain.rl.errors import ActorDied, EngineError, RewardError
from posttrain.rl.metrics import Max, Mean
from tests.fakes import FakeLearner, Loop, config, numbered

KINDS = ("load", "sample", "score", "train", "step")


def kinds(events) -> list[tuple]:
    """Without the saves; samples as (sample, version)."""
    return [(e[0], e[-1]) for e in events if e[0] in KINDS]


def sampled_versions(loop: Loop) -> list[int]:
    """Version that drew each step's samples, from the tables of rollouts; one version a batch."""
    versions = []
    for step in range(1, loop.config.steps + 1):
        found = {row["policy_version"] for row in loop.run_dir.rollouts(step)}
        assert len(found) == 1, f"step {step} mixes policies {found}"
        versions.append(found.pop())
    return versions


# -- order -------------------------------------------------------------------------------------------------------------


async def test_on_policy_generates_trains_publishes_in_turn(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=3))
    await loop.run()
    assert kinds(loop.events) == [
        ("load", 0),
        ("sample", 0),
        ("score", 0),  # step 1 alone: the check that an on-policy ratio is 1
        ("train", 0),
        ("step", 1),
        ("load", 1),
        ("sample", 1),
        ("train", 1),
        ("step", 2),
        ("load", 2),
        ("sample", 2),
        ("train", 2),
        ("step", 3),
        ("load", 3),
    ]
    assert [row["staleness/max"] for row in loop.rows()] == [0.0, 0.0, 0.0]
    assert [row["step"] for row in loop.rows()] == [1, 2, 3]
    assert [params.learning_rate for params in loop.learner.params] == pytest.approx([0.1, 0.2, 0.3])


async def test_on_policy_never_uses_a_stale_sample_whatever_the_timing(tmp_path) -> None:
    for seed in range(10):
        loop = Loop(tmp_path / str(seed), config(steps=5), pauses=random.Random(seed))
        await loop.run()
        assert sampled_versions(loop) == [0, 1, 2, 3, 4], seed
        assert {row["staleness/max"] for row in loop.rows()} == {0.0}


async def test_the_sampler_sleeps_while_the_trainer_works_and_wakes_for_evaluations(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=3, evaluation={"every": 1, "samples": 2}))
    asleep = []

    async def look(name: str) -> None:
        if name == "forward_backward":
            asleep.append(not loop.sampler.awake)

    loop.learner.before = look
    await loop.run()
    assert asleep == [True, True, True]


async def test_what_was_sampled_is_what_is_trained_on(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=1))
    await loop.run()
    [[batch]] = loop.learner.batches
    # Two groups of three: prompts of two tokens, completions of 1, 2, 3; rewards 0, 1, 2.
    assert batch.num_sequences == 6 and batch.num_loss_tokens == 12
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 12, 15, 19, 24]
    advantages = batch.advantages[batch.loss_mask].tolist()
    # Mean 1, deviation 1 (unbiased); 1e-6 is added to the deviation.
    assert advantages == pytest.approx([-1, 0, 0, 1, 1, 1] * 2, abs=1e-5)
    assert batch.rollout_logprobs[batch.loss_mask].tolist() == [-0.5] * 12


# -- phases ------------------------------------------------------------------------------------------------------------


async def test_the_phases_of_on_policy_steps(tmp_path) -> None:
    """Asleep from the last sample to the next batch; published asleep; the trainer's reserve goes back before waking;
    after the last step nothing wakes."""
    loop = Loop(tmp_path, config(steps=2))
    await loop.run()
    names = [event[0] for event in loop.events if event[0] not in ("score", "save")]
    step = ["release", "wake", "sample", "sleep", "train", "step", "load"]
    assert names == ["load", *step, *step]


async def test_the_sampler_sleeps_while_rewards_still_work(tmp_path) -> None:
    """Scores come only once the sampler has been put to sleep: in the other order this would hang."""
    asleep = asyncio.Event()

    async def patient(completion: str) -> float:
        await asleep.wait()
        return numbered(completion)

    loop = Loop(tmp_path, config(steps=1), reward=patient)

    async def look(name: str) -> None:
        if name == "sleep":
            asleep.set()

    loop.sampler.before = look
    await loop.run()
    assert [row["reward/mean"] for row in loop.rows()] == [1.0]


async def test_the_sampler_stays_awake_for_refills(tmp_path) -> None:
    """With dynamic sampling it is known only after the rewards whether more is to be drawn."""
    settings = config(steps=1, max_refills=3, algorithm={"name": "grpo", "dynamic_sampling": True})
    loop = Loop(tmp_path, settings, reward=lambda completion: 1.0)
    await loop.run()
    names = [event[0] for event in loop.events if event[0] in ("wake", "sample", "sleep")]
    assert names == ["wake", "sample", "sample", "sample", "sample", "sleep"]


async def test_overlapped_the_sampler_never_sleeps(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=4, max_staleness=1, evaluation={"every": 2, "samples": 2}))
    await loop.run()
    assert [event[0] for event in loop.events if event[0] in ("wake", "sleep")] == ["wake"]


async def test_a_step_is_written_while_the_next_batch_is_sampled(tmp_path) -> None:
    """Lines and samples of step 1 wait for the second batch's request: written before it, this would time out."""
    loop = Loop(tmp_path, config(steps=2))
    requested = threading.Event()
    batches = 0

    async def count(name: str) -> None:
        nonlocal batches
        batches += name == "sample"
        if batches == 2:
            requested.set()

    loop.sampler.before = count
    log = loop.sinks.log

    def patient(step: int, values) -> None:
        assert requested.wait(5), "the next batch was not requested while the step was written"
        log(step, values)

    loop.sinks.log = patient
    await loop.run()
    assert [row["step"] for row in loop.rows()] == [1, 2]


async def test_on_policy_a_checkpoint_is_written_while_the_next_batch_is_sampled(tmp_path) -> None:
    """And the run resumed from it equals the uninterrupted one: the batch in flight is drawn again, the same."""
    settings = config(steps=4, checkpoint={"every": 2})
    loop = Loop(tmp_path, settings)
    saved, batches = asyncio.Event(), 0

    async def hold(name: str) -> None:
        nonlocal batches
        batches += name == "sample"
        if name == "sample" and batches == 3:
            await saved.wait()
            raise EngineError("the machine goes down")

    async def tell(name: str) -> None:
        if name == "save":
            saved.set()

    loop.sampler.before, loop.learner.before = hold, tell
    with pytest.raises(EngineError, match="goes down"):
        await loop.run()
    assert loop.checkpoints() == ["step_000002"]
    resumed = Loop(tmp_path, settings)
    assert resumed.progress.pending == []
    await resumed.run()
    whole = Loop(tmp_path / "whole", settings)
    await whole.run()
    assert resumed.rows() == whole.rows()


@pytest.mark.parametrize("ahead", [0, 1])
async def test_rows_do_not_depend_on_the_order_in_which_groups_come(tmp_path, ahead) -> None:
    settings = config(steps=4, prompts_per_step=4, max_staleness=ahead, evaluation={"every": 2, "samples": 2})
    rows = []
    for seed in range(6):
        loop = Loop(tmp_path / str(seed), settings, pauses=random.Random(seed))
        await loop.run()
        rows.append((loop.rows(), [loop.run_dir.rollouts(step) for step in range(1, 5)]))
    assert all(row == rows[0] for row in rows)


async def test_the_timeline_of_on_policy_steps(tmp_path) -> None:
    """The evaluation before step 1 has woken the sampler, that after step 3 wakes it anew."""
    loop = Loop(tmp_path, config(steps=3, evaluation={"every": 3, "samples": 2}))
    await loop.run()
    phases = {"rollout", "reward", "sleep", "wait", "train", "score", "forward_backward", "optim_step"}
    phases |= {"publish", "export", "load"}
    for step in (1, 2, 3):
        spans = loop.run_dir.timeline(step)
        expected = phases | ({"log", "wake"} if step > 1 else set()) | ({"evaluate"} if step == 3 else set())
        assert {span.name for span in spans} == expected
        at = {span.name: span for span in spans if span.name != "wait"}
        order = ["rollout", "sleep", "train", "publish"]
        assert all(at[one].stop <= at[other].start for one, other in itertools.pairwise(order))
        for outer, inner in [("train", "forward_backward"), ("train", "optim_step"), ("publish", "load")]:
            assert at[outer].start <= at[inner].start <= at[inner].stop <= at[outer].stop
        row = loop.run_dir.metrics()[step]
        assert row["step"] == step
        for name in ("sleep", "wake", "train", "publish", "export", "load", "wait"):
            total = sum(span.stop - span.start for span in spans if span.name == name)
            assert row[f"time/{name}_s"] == pytest.approx(total, abs=1e-5)
        assert 0 <= row["time/idle_s"] <= row["time/step_s"]
        assert {"time/rollout_s", "time/reward_s", "time/reward_busy_s"} <= row.keys()
        samples, tokens = row["perf/samples_per_second"], row["perf/tokens_per_second"]
        assert tokens == pytest.approx(samples * 2), "completions of 1, 2 and 3 tokens"
        assert samples == pytest.approx(6 / (row["time/step_s"] - row.get("time/evaluate_s", 0)))


async def test_the_timeline_of_overlapped_steps_shows_sampling_beside_training(tmp_path) -> None:
    """Training of step 1 waits until the second batch is being sampled, and that batch until the training is over."""
    loop = Loop(tmp_path, config(steps=2, max_staleness=1))
    sampling, trained, batches = asyncio.Event(), asyncio.Event(), 0

    async def sample(name: str) -> None:
        nonlocal batches
        batches += name == "sample"
        if name == "sample" and batches == 2:
            sampling.set()
            await trained.wait()

    async def learn(name: str) -> None:
        if name == "forward_backward":
            await sampling.wait()
        if name == "optim_step":
            trained.set()

    loop.sampler.before, loop.learner.before = sample, learn
    await loop.run()
    spans = loop.run_dir.timeline(1)
    [gradient] = [span for span in spans if span.name == "forward_backward"]
    assert any(s.name == "rollout" and s.start < gradient.stop and gradient.stop < s.stop for s in spans)


async def test_a_process_that_died_is_reported_and_nothing_is_saved(tmp_path) -> None:
    """Saving would ask the dead process."""
    loop = Loop(tmp_path, config(steps=4))
    batches = 0

    async def die(name: str) -> None:
        nonlocal batches
        batches += name == "sample"
        if batches == 3:
            raise ActorDied("the sampler's process died", "sampler")

    loop.sampler.before = die
    with pytest.raises(ActorDied, match="the sampler's process died"):
        await loop.run()
    assert [row["step"] for row in loop.rows()] == [1, 2]
    assert loop.checkpoints() == []


# -- several updates a batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("updates", "epochs", "trained_at"),
    [(2, 1, [0, 1, 2, 3]), (1, 2, [0, 1, 2, 3]), (2, 2, [0, 1, 2, 3, 4, 5, 6, 7])],
)
async def test_old_logprobs_are_scored_once_before_the_first_update(tmp_path, updates, epochs, trained_at) -> None:
    loop = Loop(tmp_path, config(steps=2, updates_per_batch=updates, epochs_per_batch=epochs))
    await loop.run()
    versions = updates * epochs
    assert [event[1] for event in loop.events if event[0] == "train"] == trained_at
    assert [event[1] for event in loop.events if event[0] == "score"] == [0] * updates + [versions] * updates
    for index, batches in enumerate(loop.learner.batches):
        start_of_step = index // versions * versions
        for batch in batches:
            assert set(batch.old_logprobs.tolist()) == {-float(start_of_step)}
    sizes = [sum(batch.num_sequences for batch in batches) for batches in loop.learner.batches]
    assert sizes == [6 // updates] * (2 * versions)
    assert sampled_versions(loop) == [0, versions]
    assert [row["staleness/max"] for row in loop.rows()] == [0.0, 0.0]


async def test_strictly_on_policy_needs_no_scores_after_the_first_step(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=3))
    await loop.run()
    assert [batches[0].old_logprobs is None for batches in loop.learner.batches] == [False, True, True]


async def test_reference_logprobs_come_from_the_base(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=1, algorithm={"name": "grpo", "kl_coef": 0.1}))
    await loop.run()
    assert set(loop.learner.batches[0][0].ref_logprobs.tolist()) == {-100.0}


# -- overlapped --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_staleness_stays_within_its_limit_whatever_the_timing(tmp_path, limit) -> None:
    reached = set()
    for seed in range(12):
        loop = Loop(tmp_path / str(seed), config(steps=7, max_staleness=limit), pauses=random.Random(seed))
        await loop.run()
        ages = [step - version for step, version in enumerate(sampled_versions(loop))]
        assert [row["staleness/max"] for row in loop.rows()] == ages
        assert max(ages) <= limit
        reached.add(max(ages))
        if limit == 1:
            assert ages == [0, 1, 1, 1, 1, 1, 1], "one step ahead is reproducible"
    assert limit in reached


async def test_staleness_is_counted_in_steps_not_in_updates(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=5, max_staleness=1, updates_per_batch=2, epochs_per_batch=3))
    await loop.run()
    assert sampled_versions(loop) == [0, 0, 6, 12, 18]
    assert [row["staleness/max"] for row in loop.rows()] == [0, 1, 1, 1, 1]
    assert [row["staleness/mean"] for row in loop.rows()] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("ahead", [1, 2])
async def test_generation_really_runs_while_the_trainer_works(tmp_path, ahead) -> None:
    """Training of step 1 waits until the batch of step 1 + ahead is being sampled: without overlap it would hang."""
    loop = Loop(tmp_path, config(steps=4, max_staleness=ahead))
    batches = 0
    enough = asyncio.Event()

    async def count(name: str) -> None:
        nonlocal batches
        batches += name == "sample"
        if batches == 1 + ahead:
            enough.set()

    async def hold(name: str) -> None:
        if name == "forward_backward":
            await enough.wait()

    loop.sampler.before, loop.learner.before = count, hold
    await loop.run()
    assert sampled_versions(loop)[: 1 + ahead] == [0] * (1 + ahead)


@pytest.mark.parametrize("ahead", [0, 1, 2])
async def test_no_batch_starts_before_its_turn(tmp_path, ahead) -> None:
    """While step 1 trains, exactly ``ahead`` further batches are sampled however long it takes."""
    loop = Loop(tmp_path, config(steps=5, max_staleness=ahead))
    seen = []

    def sampled() -> int:
        return sum(event[0] == "sample" for event in loop.events)

    async def hold(name: str) -> None:
        if name == "optim_step" and not seen:
            while sampled() < 1 + ahead:  # rewards work on a thread, so it takes as long as it takes
                await asyncio.sleep(0.001)
            for _ in range(200):
                await asyncio.sleep(0)
            seen.append(sampled())

    loop.learner.before = hold
    await loop.run()
    assert seen == [1 + ahead]


async def test_one_step_ahead_is_reproducible_even_where_nothing_is_trained(tmp_path) -> None:
    """Batches without a single group to train on take no time: the next weights must not overtake the sampler."""
    settings = config(steps=6, max_staleness=1, max_refills=1, algorithm={"name": "grpo", "dynamic_sampling": True})
    loop = Loop(tmp_path, settings, reward=lambda completion: 1.0, pauses=None)
    await loop.run()
    loads = [index for index, event in enumerate(loop.events) if event[0] == "load"]
    samples = [index for index, event in enumerate(loop.events) if event[0] == "sample"]
    assert len(samples) == 6 * 2 and len(loads) == 7
    for step in range(2, 7):  # both draws of batch j + 1 lie between the publications of steps j - 1 and j
        assert loads[max(0, step - 2)] < samples[2 * step - 2] < samples[2 * step - 1] < loads[step - 1]


# -- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1])
async def test_evaluation_schedule(tmp_path, ahead) -> None:
    """Before the first step, every second, and after the last; always of the policy just published."""
    for seed in range(6):
        settings = config(steps=5, max_staleness=ahead, evaluation={"every": 2, "samples": 2})
        loop = Loop(tmp_path / str(seed), settings, pauses=random.Random(seed))
        await loop.run()
        assert [row["step"] for row in loop.rows() if "eval/pass@1" in row] == [0, 2, 4, 5]
        evaluations = [event[2] for event in loop.events if event[0] == "sample" and event[1][0].startswith("eval")]
        assert evaluations == [0, 2, 4, 5]
        for step in (0, 2, 4, 5):
            rows = loop.run_dir.rollouts(step, evaluation=True)
            assert {row["policy_version"] for row in rows} == {step} and len(rows) == 4


async def test_no_evaluation_unless_asked_for(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=2))
    await loop.run()
    assert not any(key.startswith("eval/") for row in loop.rows() for key in row)


@pytest.mark.parametrize(
    ("every", "keep", "kept"),
    [
        (2, 9, ["step_000002", "step_000004", "step_000005"]),
        (2, 2, ["step_000004", "step_000005"]),
        (0, 9, ["step_000005"]),
        (5, 9, ["step_000005"]),
    ],
)
async def test_checkpoint_schedule(tmp_path, every, keep, kept) -> None:
    loop = Loop(tmp_path, config(steps=5, checkpoint={"every": every, "keep": keep}))
    await loop.run()
    assert loop.checkpoints() == kept
    saves = [event[1] for event in loop.events if event[0] == "save"]
    assert len(saves) == len(set(saves)), "no step is saved twice"


# -- alerts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, 3, 6])
async def test_an_alert_is_logged_and_said_once_and_a_resumed_run_remembers(tmp_path, stop) -> None:
    """Everyone earns the same: five steps later it is said, whether the run was resumed before or after."""
    for steps in (stop, 8):
        if steps:
            loop = Loop(tmp_path, config(steps=steps), reward=lambda completion: 1.0)
            await loop.run()
    assert [row["alert/tied_groups"] for row in loop.rows()] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {row["alert/failures"] for row in loop.rows()} == {0}
    said = [line for line in loop.run_dir.messages_file.read_text().splitlines() if "alert" in line]
    assert len(said) == 1 and " alert at step 5: 90% or more of the groups earned equal rewards" in said[0]


# -- warm start --------------------------------------------------------------------------------------------------------


async def warm(learner: FakeLearner) -> dict[str, float]:
    learner.version, learner.weight = 30, 30.0
    learner.events.append(("warm start", 30))
    return {"loss/warm_start": 1.25}


async def test_warm_start_comes_first_is_logged_as_step_0_and_saved(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=2), warm_start=warm)
    await loop.run()
    assert [event[0] for event in loop.events[:3]] == ["warm start", "load", "save"]
    assert loop.rows()[0] == {"step": 0, "loss/warm_start": 1.25}
    assert loop.checkpoints() == ["step_000000", "step_000002"]
    assert sampled_versions(loop) == [30, 31]
    assert [row["staleness/max"] for row in loop.rows()[1:]] == [0.0, 0.0]


async def test_a_resumed_run_is_not_warmed_up_again(tmp_path) -> None:
    await Loop(tmp_path, config(steps=2), warm_start=warm).run()
    loop = Loop(tmp_path, config(steps=3), warm_start=warm)
    await loop.run()
    assert kinds(loop.events)[0] == ("load", 32)
    assert [row["step"] for row in loop.rows()] == [0, 1, 2, 3]


# -- stops and resumes -------------------------------------------------------------------------------------------------


async def run_and_stop(loop: Loop, fake: str, call: str, count: int) -> None:
    """Ask for a stop at the ``count``-th ``call``."""
    seen = 0

    async def stop(name: str) -> None:
        nonlocal seen
        seen += name == call
        if name == call and seen == count:
            loop.controller.request_stop()

    getattr(loop, fake).before = stop
    await loop.run()


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize(
    ("fake", "call", "count"),
    [("learner", "forward_backward", 3), ("sampler", "sample", 3), ("sampler", "load_adapter", 3)],
)
async def test_a_stop_saves_and_the_resumed_run_equals_an_uninterrupted_one(tmp_path, ahead, fake, call, count) -> None:
    settings = config(steps=6, max_staleness=ahead, evaluation={"every": 4, "samples": 2})
    whole = Loop(tmp_path / "whole", settings)
    await whole.run()
    stopped = Loop(tmp_path / "stopped", settings)
    await run_and_stop(stopped, fake, call, count)
    saved = stopped.run_dir.latest_checkpoint()[0]
    assert 0 < saved < 6 and [row["step"] for row in stopped.rows()] == list(range(saved + 1))
    resumed = Loop(tmp_path / "stopped", settings)
    pending = [batch.step for batch in resumed.progress.pending]
    assert pending == list(range(saved + 1, saved + 1 + len(pending)))
    assert pending or call != "sample", "a batch in flight is finished and kept"
    await resumed.run()
    prompts = [[row["prompt_id"] for row in loop.run_dir.rollouts(s)] for loop in (whole, resumed) for s in range(1, 7)]
    assert prompts[:6] == prompts[6:], "the data cursor went on where it stood"
    if ahead < 2:  # further ahead the version of a sample depends on timing
        assert resumed.rows() == whole.rows()
    assert resumed.learner.weight == whole.learner.weight == 6


async def test_a_pending_batch_is_trained_on_not_drawn_again(tmp_path) -> None:
    settings = config(steps=4)
    stopped = Loop(tmp_path, settings)
    await run_and_stop(stopped, "sampler", "sample", 3)
    drawn = [event[1] for event in stopped.events if event[0] == "sample"]
    resumed = Loop(tmp_path, settings)
    await resumed.run()
    drawn += [event[1] for event in resumed.events if event[0] == "sample"]
    assert len(drawn) == len(set(drawn)) == 4


async def test_no_batch_is_begun_after_a_stop(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=4))
    await run_and_stop(loop, "learner", "optim_step", 2)
    assert sum(event[0] == "sample" for event in loop.events) == 2
    assert [row["step"] for row in loop.rows()] == [1, 2]


async def test_a_stop_before_the_first_batch_saves_step_0(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=3))
    loop.controller.request_stop()
    await loop.run()
    assert loop.checkpoints() == ["step_000000"] and loop.rows() == []
    resumed = Loop(tmp_path, config(steps=3))
    await resumed.run()
    whole = Loop(tmp_path / "whole", config(steps=3))
    await whole.run()
    assert resumed.rows() == whole.rows()


async def test_a_finished_run_resumed_with_more_steps_goes_on(tmp_path) -> None:
    await Loop(tmp_path, config(steps=2)).run()
    resumed = Loop(tmp_path, config(steps=4))
    await resumed.run()
    whole = Loop(tmp_path / "whole", config(steps=4))
    await whole.run()
    assert resumed.rows() == whole.rows()


# -- failures ----------------------------------------------------------------------------------------------------------


def failing_from(prompt_count: int):
    """A reward that raises once it has seen that many samples."""
    seen = 0

    def fragile(completion: str) -> float:
        nonlocal seen
        seen += 1
        if seen > prompt_count:
            raise ZeroDivisionError("a bug in the reward")
        return numbered(completion)

    fragile.__name__ = "numbered"
    return fragile


@pytest.mark.parametrize("ahead", [0, 1, 2])
async def test_a_failing_reward_stops_the_run_after_what_is_complete_was_trained_and_saved(tmp_path, ahead) -> None:
    """Batch 3 fails: steps 1 and 2 are trained and saved, and after a repair the run goes on as if never broken."""
    settings = config(steps=5, max_staleness=ahead)
    for seed in range(5):
        folder = tmp_path / str(seed)
        broken = Loop(folder, settings, reward=failing_from(12), pauses=random.Random(seed))
        with pytest.raises(RewardError, match="a bug in the reward"):
            await broken.run()
        assert [row["step"] for row in broken.rows()] == [1, 2]
        assert broken.checkpoints() == ["step_000002"]
        repaired = Loop(folder, settings)
        await repaired.run()
        whole = Loop(folder / "whole", settings)
        await whole.run()
        ids = [
            [row["prompt_id"] for step in range(1, 6) for row in loop.run_dir.rollouts(step)]
            for loop in (repaired, whole)
        ]
        assert ids[0] == ids[1]
        if ahead == 0:
            assert repaired.rows() == whole.rows()


@pytest.mark.parametrize("call", ["forward_backward", "optim_step"])
async def test_a_learner_that_fails_in_mid_step_is_not_saved(tmp_path, call) -> None:
    loop = Loop(tmp_path, config(steps=4, updates_per_batch=2, checkpoint={"every": 1}))
    calls = 0

    async def fail(name: str) -> None:
        nonlocal calls
        calls += name == call
        if name == call and calls == 4:  # the second update of step 2
            raise EngineError("out of memory")

    loop.learner.before = fail
    with pytest.raises(EngineError, match="out of memory"):
        await loop.run()
    assert loop.learner.version == 3, "half of step 2 is done"
    assert loop.checkpoints() == ["step_000001"]
    resumed = Loop(tmp_path, config(steps=4, updates_per_batch=2))
    await resumed.run()
    whole = Loop(tmp_path / "whole", config(steps=4, updates_per_batch=2))
    await whole.run()
    assert resumed.rows() == whole.rows()


async def test_a_failing_evaluation_leaves_no_checkpoint_of_a_step_without_its_line(tmp_path) -> None:
    def fragile(completion: str) -> float:
        if completion.startswith("eval") and completion.endswith("@2"):
            raise ValueError("only in the evaluation")
        return numbered(completion)

    settings = config(steps=3, evaluation={"every": 2, "samples": 2}, checkpoint={"every": 1})
    loop = Loop(tmp_path, settings, reward=fragile)
    with pytest.raises(RewardError, match="only in the evaluation"):
        await loop.run()
    assert [row["step"] for row in loop.rows()] == [0, 1]
    assert loop.checkpoints() == ["step_000001"]


async def test_weights_that_did_not_arrive_stop_the_run(tmp_path) -> None:
    loop = Loop(tmp_path, config())
    loop.sampler.corrupt = True
    with pytest.raises(EngineError, match="the sampler holds other weights than the trainer published"):
        await loop.run()
    assert loop.rows() == [] and loop.checkpoints() == []


async def test_an_optimizer_step_that_moves_nothing_stops_the_run(tmp_path) -> None:
    loop = Loop(tmp_path, config())
    loop.learner.moves = False
    with pytest.raises(EngineError, match=r"gradient norm 0\.5 and learning rate 0\.1 left every trained weight"):
        await loop.run()
    assert loop.rows() == [] and loop.checkpoints() == []


async def test_base_weights_that_changed_stop_the_run_and_are_not_saved(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=4, checkpoint={"every": 2}))

    async def scribble(name: str) -> None:
        if name == "optim_step" and loop.learner.version == 2:
            loop.learner.base = "something else"

    loop.learner.before = scribble
    with pytest.raises(EngineError, match=r"frozen base weights changed during the run \(base to something else\)"):
        await loop.run()
    assert loop.checkpoints() == ["step_000002"]


async def test_the_producer_ends_with_the_loop(tmp_path) -> None:
    before = asyncio.all_tasks()
    loop = Loop(tmp_path, config(steps=4, max_staleness=2))

    async def fail(name: str) -> None:
        if name == "optim_step":
            raise EngineError("gone")

    loop.learner.before = fail
    with pytest.raises(EngineError, match="gone"):
        await loop.run()
    assert asyncio.all_tasks() == before


# -- warnings ----------------------------------------------------------------------------------------------------------


async def test_sampler_and_trainer_that_disagree_are_reported_once(tmp_path) -> None:
    loop = Loop(tmp_path, config(steps=4))
    loop.learner.figures = {"policy/kl_sampler": Mean(0.02)}
    await loop.run()
    [message] = loop.messages()
    assert message.startswith("sampler and trainer disagree: policy/kl_sampler 0.02 is above 0.01")


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"max_staleness": 1}], ids=lambda s: next(iter(s))
)
async def test_no_report_where_a_difference_is_expected(tmp_path, settings) -> None:
    loop = Loop(tmp_path, config(steps=3, **settings))
    loop.learner.figures = {"policy/kl_sampler": Mean(0.02)}
    await loop.run()
    assert loop.messages() == []


@pytest.mark.parametrize(("kl", "warned"), [(1.01, True), (0.99, False)])
@pytest.mark.parametrize(("quantization", "limit"), [("none", 0.01), ("nf4", 0.01), ("fp8", 0.06)])
async def test_kl_limit(tmp_path, kl, warned, quantization, limit) -> None:
    settings = config(steps=1)
    model = settings.model.model_copy(update={"quantization": quantization})
    loop = Loop(tmp_path, settings.model_copy(update={"model": model}))
    loop.learner.figures = {"policy/kl_sampler": Mean(kl * limit)}
    await loop.run()
    assert [f"model.quantization = {quantization}" in message for message in loop.messages()] == [True] * warned


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ({"policy/ratio_max": Max(1.01)}, "1.01"),
        ({"policy/ratio_mean": Mean(0.95)}, "0.95"),
        ({"policy/ratio_max": Max(1.0001)}, None),
    ],
)
async def test_a_first_ratio_other_than_1_is_reported(tmp_path, figures, shown) -> None:
    loop = Loop(tmp_path, config(steps=3))
    loop.learner.figures = figures
    await loop.run()
    if shown is None:
        assert loop.messages() == []
    else:
        [message] = loop.messages()
        assert message.startswith(f"exp(logprobs - old_logprobs) reaches {shown} on the very policy that is trained")


@pytest.mark.parametrize(
    "settings", [{"updates_per_batch": 2}, {"epochs_per_batch": 2}, {"algorithm": "vespo"}], ids=str
)
async def test_ratios_that_may_differ_from_1_are_not_reported(tmp_path, settings) -> None:
    """Later updates move away from the old policy; VESPO's ratio is to the sampler."""
    loop = Loop(tmp_path, config(steps=2, **settings))
    loop.learner.figures = {"policy/ratio_max": Max(1.2)}
    await loop.run()
    assert loop.messages() == []


async def test_a_step_with_nothing_to_train_says_so_and_changes_nothing(tmp_path) -> None:
    settings = config(steps=2, max_refills=1, algorithm={"name": "grpo", "dynamic_sampling": True})
    loop = Loop(tmp_path, settings, reward=lambda completion: 1.0)
    await loop.run()
    assert loop.learner.version == 0 and loop.learner.batches == []
    assert len(loop.messages()) == 2 and "every group earned equal rewards after 1 refills" in loop.messages()[0]
    assert [row["rollout/groups"] for row in loop.rows()] == [4, 4]
