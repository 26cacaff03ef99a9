"""However a run in actors ends, nothing of it is left: no process of the Ray session it started, no shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from posttrain.rl.service.reaper import descendants, is_alive

from .forks import PATIENCE, wait_until

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).with_name("tiny.toml")
SECONDS = 5.0
"""All must be gone by then."""


class Driver:
    """``posttrain train`` in a process of its own, and whatever it started."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        command = [str(Path(sys.executable).with_name("posttrain")), "train", str(CONFIG)]
        settings = [f"output_dir={folder}", "run_name=run", "placement=ray", "steps=100000", *overrides]
        command += [argument for setting in settings for argument in ("--set", setting)]
        self.metrics = folder / "run" / "metrics.jsonl"
        self.output = folder / "output.txt"
        self.shared = shared_memory()
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                cwd=folder,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.family = set()

    def lines(self) -> int:
        """Of metrics; notes whom the run has started so far."""
        self.family |= descendants(self.process.pid)
        assert self.process.poll() is None, self.output.read_text()
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def wait_for_step(self, step: int) -> None:
        """Long: two processes import torch and transformers first, on a machine that may be busy."""
        end = time.monotonic() + 4 * PATIENCE
        while self.lines() <= step:
            assert time.monotonic() < end, self.output.read_text()
            time.sleep(0.05)

    def assert_gone(self) -> None:
        """Within ``SECONDS``."""
        end = time.monotonic() + SECONDS
        while left := self.left():
            assert time.monotonic() < end, left
            time.sleep(0.05)
        assert shared_memory() <= self.shared

    def left(self) -> list[str]:
        """Command lines of what still runs: all that was seen below the driver, or names its Ray session."""
        mark = f"_{self.process.pid}/"
        found = [commandline(pid) for pid, _ in filter(is_alive, self.family)]
        processes = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return found + [line for line in map(commandline, processes) if "/session_" in line and mark in line]


def commandline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def shared_memory() -> set[str]:
    """Files of torch, NCCL and ours that no living process has mapped: other runs on this machine keep theirs."""
    files = {str(path) for path in Path("/dev/shm").glob("*") if path.name.startswith(("torch_", "nccl-", "posttrain"))}
    for process in Path("/proc").iterdir():
        if files and process.name.isdigit():
            with suppress(OSError):
                mapped = (process / "maps").read_text()
                files = {file for file in files if file not in mapped}
    return files


@pytest.fixture
def driver(tmp_path):
    started: list[Driver] = []

    def start(*overrides: str) -> Driver:
        started.append(Driver(tmp_path, *overrides))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_driver_killed_while_it_trains(driver) -> None:
    one = driver()
    one.wait_for_step(2)
    assert len(one.family) > 6, "Ray's servers and two actors"
    one.process.kill()
    one.assert_gone()


def test_driver_killed_while_ray_starts(driver) -> None:
    one = driver()
    wait_until(lambda: one.lines() < 0 or any("raylet" in commandline(pid) for pid, _ in one.family), "the raylet")
    time.sleep(0.5)
    one.lines()
    one.process.kill()
    one.assert_gone()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_asked_to_stop(driver, number, status) -> None:
    one = driver()
    one.wait_for_step(2)
    one.process.send_signal(number)
    assert one.process.wait(60) == status, one.output.read_text()
    one.assert_gone()
    assert list((one.metrics.parent / "checkpoints").iterdir()), "it has saved"


def test_two_ctrl_c_end_it_at_once(driver) -> None:
    one = driver()
    one.wait_for_step(2)
    one.process.send_signal(signal.SIGINT)
    wait_until(lambda: "once more to stop at once" in one.output.read_text(), "the word that it stops")
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(60) == 130
    one.assert_gone()


def test_a_reward_that_fails(driver, tmp_path) -> None:
    (tmp_path / "own.py").write_text("def broken(completion):\n    return float('nan')\n")
    one = driver(f'rewards=["{tmp_path}/own.py:broken"]')
    while one.process.poll() is None:
        one.family |= descendants(one.process.pid)
        time.sleep(0.05)
    assert one.process.returncode == 2 and "reward broken returned nan" in one.output.read_text()
    assert len(one.family) > 6
    one.assert_gone()
