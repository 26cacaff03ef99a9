"""vLLM and the trainer as two actors on one GPU: killed, stopped, failed; the run goes on, or gives everything back."""

from __future__ import annotations

import importlib.util
import signal
import time

import pytest
import torch

from posttrain.rl import machine
from posttrain.rl.config import load
from posttrain.rl.run_dir import RunDir
from posttrain.rl.service import run

from .killing import Killing
from .test_kill_and_resume import CONFIG, STEPS
from .test_nothing_left_behind import Driver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None or not torch.cuda.is_available(), reason="needs vLLM and an NVIDIA GPU"
    ),
]
SETTINGS = [
    "model.random.config.hidden_size=64",
    "model.random.config.head_dim=32",
    "model.random.config.max_position_embeddings=128",
    "rollout.engine=vllm",
    "rollout.enforce_eager=true",
    "rollout.kv_cache_gib=1.0",
    "data.max_prompt_tokens=32",
]
TOLERANCE = 128 * machine.MIB


def free_memory() -> int:
    """As the driver's own tool sees it: no CUDA context in this process."""
    [gpu, *_] = machine.gpus()
    assert gpu.free is not None
    return gpu.free


def assert_memory_is_back(before: int) -> None:
    end = time.monotonic() + 10
    while (free := free_memory()) < before - TOLERANCE:
        assert time.monotonic() < end, f"{(before - free) / machine.MIB:.0f} MiB are still held"
        time.sleep(0.2)


def test_trainer_killed_then_engine_killed_then_the_run_completes(monkeypatch, tmp_path) -> None:
    before, context = free_memory(), torch.cuda.is_initialized()
    killing = Killing(monkeypatch, {("trainer", "forward_backward", 16), ("sampler", "stream", 10)})
    config = load(CONFIG, [f"output_dir={tmp_path}", "run_name=run", *SETTINGS])
    result = RunDir(run.train(config, base=CONFIG.parent).run_dir)
    assert not killing.waiting
    homes = killing.homes
    assert [row["step"] for row in result.metrics()] == list(range(STEPS + 1))
    assert [name for name, _, _ in homes] == ["sampler", "trainer", "trainer", "sampler", "trainer"], homes
    assert len({pid for _, pid, _ in homes}) == 5, homes
    assert killing.calls["sampler", "export_weights"] == 3, (
        "asked anew by each trainer, of the living engine by the second"
    )
    assert torch.cuda.is_initialized() == context, "this process opened no CUDA context"
    assert_memory_is_back(before)


@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C", "a reward that fails"])
def test_nothing_is_held_after(how, tmp_path) -> None:
    before, settings = free_memory(), list(SETTINGS)
    if how == "a reward that fails":
        (tmp_path / "own.py").write_text("def broken(completion):\n    return float('nan')\n")
        settings += [f'rewards=["{tmp_path}/own.py:broken"]']
    driver = Driver(tmp_path, *settings)
    try:
        if how == "a reward that fails":
            assert driver.process.wait(240) == 2, driver.output.read_text()
        else:
            driver.wait_for_step(2)
            assert free_memory() < before - machine.GIB, "the KV cache alone is that large"
            driver.process.send_signal(signal.SIGKILL if how == "kill -9" else signal.SIGINT)
            assert driver.process.wait(60) == (-signal.SIGKILL if how == "kill -9" else 130)
        driver.assert_gone()
        assert_memory_is_back(before)
    finally:
        driver.process.kill()
        driver.process.wait()
