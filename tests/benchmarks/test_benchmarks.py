"""What the benchmark scripts do with what they measured, and that a process they cut leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "script",
    [
        "one_gpu",
        "two_gpus",
        "learning",
        "colab_on_gpu",
        "random_checkpoint",
        "fp8_linear",
        "nf4_linear",
        "token_logprobs",
        "lora_products",
        "elementwise_tiles",
        "shared_attention",
        "training_step",
        "memory_model",
        "rewards",
    ],
)
def test_each_script_explains_itself(script: str):
    done = subprocess.run(
        [sys.executable, HERE / f"{script}.py", "--help"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_a_curve_is_read_from_metrics_that_end_in_half_a_line(tmp_path: Path):
    import learning

    rows = [{"step": 0, "eval/pass@1": 0.125}]
    for step in range(1, 21):
        row = {"step": step, "reward/mean": step / 20, "time/step_s": 10.0 if step < 3 else float(step)}
        row |= {"policy/kl_sampler": 1e-3 * step} | ({"eval/pass@1": step / 20} if step % 4 == 0 else {})
        rows.append(row)
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "rewa')
    curve = learning.read_curve(file)
    assert curve.steps == list(range(1, 21)) and curve.rewards[9] == 0.5
    assert curve.eval_steps == [0, 4, 8, 12, 16, 20] and curve.passed == [0.125, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert curve.steps_to_goal == 16
    assert curve.step_seconds == 12.0  # of 3, 4, … 20 the tenth
    assert curve.kl_sampler == pytest.approx(0.02)
    written = learning.table({"addition-grpo-nf4": curve}, {"addition-grpo-nf4": "cut after 9 s"}).splitlines()[-1]
    assert written == "| addition-grpo-nf4 | 0.12 → 1.00 | 20 | 16 | 12.00 | 2.0e-02 | cut after 9 s |"


def test_runs_that_never_started_leave_dashes_and_an_empty_panel(tmp_path: Path):
    import learning

    nothing = learning.read_curve(tmp_path / "metrics.jsonl")
    assert learning.table({"chain_sum-gspo-bf16": nothing}, {}).splitlines()[-1] == (
        "| chain_sum-gspo-bf16 | – | – | – | – | – | not started |"
    )
    learning.plot({"chain_sum-gspo-bf16": nothing}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_left_of_a_job_is_killed_even_in_a_session_of_its_own(tmp_path: Path):
    import processes

    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    job = processes.start("sleeper", [sys.executable, "-c", script], tmp_path / "log")
    deadline = time.monotonic() + 60
    while not job.tail() and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(job.tail())
    assert Path(f"/proc/{child}").exists()
    assert processes.run(job, 0.1) is None
    assert job.process.returncode == -9
    states = Path(f"/proc/{child}/stat")
    assert not states.exists() or states.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_job_that_ends_by_itself_gives_its_exit_status(tmp_path: Path):
    import processes

    job = processes.start("quick", [sys.executable, "-c", "print('done'); raise SystemExit(3)"], tmp_path / "log")
    assert processes.run(job, 60) == 3
    assert job.tail() == "done"


def test_records_survive_a_log_and_become_tables(capsys: pytest.CaptureFixture[str]):
    import report

    report.emit("sleep", "bf16", returned_pct=99.123456, wake_s=0.16)
    print("something else")
    report.emit("storage", "bf16", flip_seen=True)
    with report.attempt("sleep", "nf4"):
        raise ValueError("no GPU\nand more")
    found = report.records(capsys.readouterr().out)
    assert found == [
        {"measurement": "sleep", "case": "bf16", "returned_pct": 99.123, "wake_s": 0.16},
        {"measurement": "storage", "case": "bf16", "flip_seen": True},
        {"measurement": "sleep", "case": "nf4", "error": "ValueError: no GPU"},
    ]
    assert report.tables(found, {"sleep.wake_s": "< 0.5"}) == (
        "| sleep | returned_pct | wake_s (< 0.5) | error |\n|---|---|---|---|\n"
        "| bf16 | 99.12 | 0.16 |  |\n| nf4 |  |  | ValueError: no GPU |\n\n"
        "| storage | flip_seen |\n|---|---|\n| bf16 | True |"
    )


def test_the_phases_of_a_start_are_read_from_its_log():
    import one_gpu

    log = (
        "(pid=3) INFO torch.compile took 4.25 s in total\nINFO Graph capturing finished in 2 secs, took 0.10 GiB\n"
        "(_Host pid=3) vLLM started in 21.5 s: import 8.1, tokenizer and shapes 0.9, load 3.0\n"
    )
    assert one_gpu.start_phases("pair nf4", log) == [
        {
            "measurement": "engine start, seconds",
            "case": "pair nf4",
            "whole": 21.5,
            "import": 8.1,
            "tokenizer and shapes": 0.9,
            "load": 3.0,
            "of it torch.compile": 4.25,
            "of it graphs": 2.0,
        }
    ]
    assert one_gpu.start_phases("pair nf4", "nothing of the kind") == []


def test_every_case_is_a_child_that_parses():
    import one_gpu

    options = one_gpu.parse(["--bases", "bf16", "fp8", "--places", "in-process", "subprocess"])
    found = dict(one_gpu.cases(options))
    assert len(found) == 2 + 2 * 3 * 2 + 2 * 2
    for arguments in found.values():
        child = one_gpu.parse(["--child", *arguments])
        assert child.child in one_gpu.MEASUREMENTS and child.base in ("bf16", "fp8")
    assert one_gpu.parse(["--child", *found["step fp8 1"]]).max_staleness == 1
    assert one_gpu.parse(["--child", *found["decode bf16 slots subprocess"]]).lora == "slots"


def test_the_random_checkpoint_fills_its_vocabulary(tmp_path: Path):
    import random_checkpoint
    import torch
    from transformers import AutoConfig, AutoTokenizer

    folder = random_checkpoint.write(tmp_path / "model", "tiny", torch.float32)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert len(tokenizer) == config.vocab_size == random_checkpoint.SHAPES["tiny"]["vocab_size"]
    assert tokenizer.decode(tokenizer("What is 2 + 2?")["input_ids"]) == "What is 2 + 2?"
    before = (folder / "config.json").stat().st_mtime_ns
    random_checkpoint.write(folder, "tiny", torch.float32)
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_two_gpus_are_compared_by_the_medians_of_all_steps_but_the_first():
    import two_gpus

    def step(gpus: int, number: int, rate: float, rollout: float, train: float) -> dict:
        case = f"{gpus} GPU{'s' * (gpus > 1)}, step {number}"
        figures = {"samples_per_second": rate, "rollout_s": rollout, "train_s": train}
        return {"measurement": "steps", "case": case, "gpus": gpus, **figures}

    one = [
        step(1, 1, 1.0, 90.0, 90.0),
        step(1, 2, 10.0, 8.0, 4.0),
        step(1, 3, 12.0, 6.0, 5.0),
        step(1, 11, 11.0, 7.0, 6.0),
    ]
    two = [step(2, 1, 1.0, 90.0, 90.0), step(2, 2, 22.0, 3.5, 2.0)]
    ratios = two_gpus.compared([*one, *two, {"measurement": "not finished", "case": "x", "ending": "cut"}])
    assert {key: ratios[key] for key in ("samples_per_second", "rollout_s", "train_s")} == {
        "samples_per_second": 2.0,
        "rollout_s": 2.0,
        "train_s": 2.5,
    }
    assert two_gpus.compared(one) is None


@pytest.mark.parametrize("case", ["ours", "ours, checkpointing", "prompt 1024 × 8, shared", "peft, checkpointing"])
def test_everyone_trains_on_the_same_thing(tmp_path: Path, case: str):
    """A step runs, and the gradient of everyone is that of peft and transformers in float32."""
    import random_checkpoint
    import torch
    import training_peers
    import training_step
    from training_task import DEVICE, relative_error

    if DEVICE.type != "cpu":
        pytest.skip("half precision there: training_step.py reports the errors")

    folder = random_checkpoint.write(tmp_path / "model", "tiny", torch.float32)
    group, settings = next((group, found[case]) for group, found in training_step.CASES.items() if case in found)
    if group in ("ours", "prompts"):
        settings = {"kernels": "reference", "device": "cpu", **settings}
    task = training_step.small_task(tiny=True)
    contender = training_step.build(group, settings, folder, task, "bf16")
    exact = training_peers.peft(folder, task, "bf16", dtype=torch.float32).gradient()
    assert sum(gradient.norm() for gradient in exact.values()) > 0.1
    assert relative_error(contender.gradient(), exact) < 1e-5
    contender.step()


def test_a_training_step_is_a_child_that_parses():
    import training_step

    cases = [case for found in training_step.CASES.values() for case in found]
    assert len(cases) == len(set(cases)) == 11
    for case in cases:
        assert training_step.parse(["--child", case, "--shape", "tiny"]).child == case
        task = training_step.task_of(case, tiny=False)
        assert task.tokens == (20480 if case.startswith("prompt") else 16384)
        ids = task.ids(1000)
        assert ids.shape == (16, task.prompt + task.completion)
        same = (ids[0, : task.prompt] == ids[1, : task.prompt]).all()
        assert same == case.startswith("prompt") and (ids[0] != ids[1]).any()
