"""A run that is asleep looks idle to the driver: what it may still take is not another run's to have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.rl import claims, machine
from posttrain.rl.claims import claimed, live, unclaimed
from posttrain.rl.errors import ConfigError, EngineError
from posttrain.rl.machine import GIB, Claim, Gpu, Process
from posttrain.rl.memory import available, check_fits
from tests.rl.architectures import QWEN3_4B, configured

CARD = Gpu(0, "H", 80 * GIB, 70 * GIB, (9, 0), "1", uuid="GPU-a")
PROCESSES = {10: (1, "t10"), 11: (10, "t11"), 12: (11, "t12"), 20: (1, "t20"), os.getpid(): (1, "mine"), 1: (0, "t1")}
"""10 is a driver; 12 comes from it through 11."""


@pytest.fixture(autouse=True)
def imagined(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(claims.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(machine, "process_stat", PROCESSES.get)
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine.platform, "release", lambda: "6.1")
    monkeypatch.setattr(machine, "gpus", lambda: [CARD])


def claim(pid: int, size: int, started: str | None = None, gpu: str = "GPU-a") -> Claim:
    """Written as another process would."""
    made = Claim(pid, started or f"t{pid}", size, f"/runs/{pid}")
    claims.folder().mkdir(exist_ok=True)
    (claims.folder() / f"{gpu}_{pid}.json").write_text(
        json.dumps({"pid": pid, "started": made.started, "size": size, "run": made.run})
    )
    return made


def test_only_claims_of_living_processes_count_and_only_on_their_gpu() -> None:
    assert live(CARD) == ()
    small, large = claim(10, GIB), claim(20, 3 * GIB)
    claim(11, GIB, started="the process that had this id before")
    claim(30, GIB)  # gone
    claim(os.getpid(), GIB, started="mine")
    claim(12, GIB, gpu="GPU-ab")
    assert live(CARD) == (large, small)
    left = sorted(file.name for file in claims.folder().iterdir())
    assert left == sorted([f"GPU-a_{pid}.json" for pid in (10, 20, os.getpid())] + ["GPU-ab_12.json"])
    assert live(replace(CARD, uuid="")) == ()


def test_a_claim_lasts_as_long_as_its_run(monkeypatch) -> None:
    other = replace(CARD, uuid="GPU-b")
    with pytest.raises(KeyboardInterrupt), claimed([CARD, other], 5 * GIB, "/runs/mine"):
        assert live(CARD) == (), "one's own"
        me = os.getpid()
        monkeypatch.setattr(claims.os, "getpid", lambda: me + 1)
        for gpu in (CARD, other):
            assert live(gpu) == (Claim(me, "mine", 5 * GIB, "/runs/mine"),)
        raise KeyboardInterrupt
    assert live(CARD) == live(other) == () and not list(claims.folder().iterdir())


def test_a_killed_run_claims_nothing(monkeypatch, tmp_path) -> None:
    """With a real process and the system's own word on it."""
    monkeypatch.undo()
    monkeypatch.setattr(claims.tempfile, "gettempdir", lambda: str(tmp_path))
    code = (
        "from posttrain.rl.claims import claimed\n"
        "from posttrain.rl.machine import Gpu\n"
        "with claimed([Gpu(0, 'H', 1, 1, None, '', uuid='GPU-a')], 7, '/runs/other'):\n"
        "    print('ready', flush=True)\n"
        "    input()\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        [found] = live(CARD)
        assert (found.pid, found.size, found.run) == (child.pid, 7, "/runs/other")
        child.kill()
    assert live(CARD) == () and not list(claims.folder().iterdir())


A, B = Claim(10, "t10", 30 * GIB, "/runs/a"), Claim(20, "t20", 20 * GIB, "/runs/b")


@pytest.mark.parametrize(
    ("held", "free", "claimed_by", "expected"),
    [
        ([], 70, [], 70),
        ([], 70, [A], 50),  # 80 - 30
        ([], 40, [A], 40),  # awake: what it holds is not counted twice
        ([], 70, [A, B], 30),
        ([(12, 4)], 70, [A], 50),  # 12 is a process of A's
        ([(12, 4), (77, 6)], 70, [A], 44),  # 77 is not: 80 - 30 - 6
        ([(12, 4), (77, None)], 64, [A], 50),  # the driver does not tell how much
        ([(77, 6)], 70, [], 70),
        ([(77, 60)], 20, [A, B], 0),
    ],
)
def test_what_is_left_by_hand(
    held: list[tuple[int, int | None]], free: int, claimed_by: list[Claim], expected: int
) -> None:
    processes = tuple(Process(pid, "p", None if used is None else used * GIB) for pid, used in held)
    gpu = replace(CARD, processes=processes)
    assert unclaimed(80 * GIB, free * GIB, gpu, claimed_by) == expected * GIB


def test_a_second_run_is_refused_with_the_name_of_the_first() -> None:
    rollout = {"engine": "vllm", "prompts_per_step": 4, "group_size": 8, "max_tokens": 512}
    config = configured(QWEN3_4B, rollout=rollout, trainer={"micro_batch_tokens": 4096})
    assert check_fits(config).least < 70 * GIB
    first = claim(10, 70 * GIB)
    memory = available("auto", 1)
    assert memory is not None and (memory.free, memory.claims) == (10 * GIB, (first,))
    refusal = (
        r"^GPU 0 \(H\): 10\.0 of 80\.0 GiB free and not claimed, this run needs at least .*: "
        r"the run of process 10 \(/runs/10\) may take 70\.00 GiB; stop it, or lower its gpu_memory_gib$"
    )
    with pytest.raises(ConfigError, match=refusal):
        check_fits(config)
    claim(10, 70 * GIB, started="another process")
    assert check_fits(config).least < 70 * GIB


def test_a_folder_that_cannot_be_written() -> None:
    claims.folder().touch()
    with pytest.raises(EngineError, match=r"cannot write .*GPU-a_\d+\.json \(.*\): set TMPDIR"), claimed([CARD], 1, ""):
        pass


def test_without_the_systems_word_on_processes_nothing_is_claimed(monkeypatch) -> None:
    monkeypatch.setattr(machine, "process_stat", lambda pid: None)
    with claimed([CARD], 1, ""):
        assert not Path(claims.folder()).exists()
