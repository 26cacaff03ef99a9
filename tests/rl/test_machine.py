"""What the machine is read from: the driver's recorded answers, imagined files of a container."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from posttrain.rl import machine
from posttrain.rl.machine import MIB, Gpu, Process

SMI = """0, GPU-aaaa-1, NVIDIA H200, 143771, 143000, 9.0, 570.1
1, GPU-bbbb-2, Tesla T4, 15360, 15000, 7.5, 570.1
2, GPU-aaab-3, NVIDIA A100, [N/A], [N/A], 8.0, 570.1
"""


APPS = """GPU-bbbb-2, 77, [N/A], [Not Found]
GPU-aaaa-1, 5, 300, /usr/bin/x, with a comma
GPU-aaaa-1, 1234, 110000, /opt/venv/bin/python3
GPU-aaaa-1, [N/A], 10, nobody
"""


@pytest.fixture
def smi(monkeypatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi")

    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        told = APPS if command[1].startswith("--query-compute-apps=gpu_uuid,pid,used_memory,process_name") else SMI
        return subprocess.CompletedProcess(command, 0, told, "")

    monkeypatch.setattr(machine.subprocess, "run", answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_are_read_from_the_driver(smi) -> None:
    first, second, third = machine.gpus()
    holders = (Process(1234, "python3", 110000 * MIB), Process(5, "x, with a comma", 300 * MIB))
    assert first == Gpu(0, "NVIDIA H200", 143771 * MIB, 143000 * MIB, (9, 0), "570.1", holders, "GPU-aaaa-1")
    assert second.processes == (Process(77, "", None),) and third.processes == ()
    assert (second.capability, third.total, third.free) == ((7, 5), None, None)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [("1", [1]), ("2,0", [2, 0]), ("", []), ("-1", []), ("0,7,1", [0]), ("GPU-bbbb", [1]), ("GPU-aaa", [])],
)
def test_only_visible_gpus_count_in_their_order(smi, monkeypatch, visible: str, indices: list[int]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in machine.gpus()] == indices


def test_no_driver_or_a_broken_one_means_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    assert machine.gpus() == []

    def broken(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(machine.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(machine.subprocess, "run", broken)
    assert machine.gpus() == []


def test_a_driver_that_names_no_process(smi, monkeypatch) -> None:
    """As in most containers."""
    only_gpus = lambda command, **_: subprocess.CompletedProcess(command, 0, SMI * ("gpu=" in command[1]), "")  # noqa: E731
    monkeypatch.setattr(machine.subprocess, "run", only_gpus)
    assert [gpu.processes for gpu in machine.gpus()] == [(), (), ()]


@pytest.mark.parametrize(
    ("capability", "dtypes"),
    [
        ((6, 1), ()),
        ((7, 5), ("fp16",)),
        ((8, 0), ("fp16", "bf16")),
        ((8, 6), ("fp16", "bf16")),
        ((8, 9), ("fp16", "bf16", "fp8")),
        ((9, 0), ("fp16", "bf16", "fp8")),
        ((12, 0), ("fp16", "bf16", "fp8", "fp4")),
        (None, ()),
    ],
)
def test_number_formats_follow_the_generation(capability, dtypes: tuple[str, ...]) -> None:
    assert Gpu(0, "x", 1, 1, capability, "1").dtypes == dtypes


def test_a_container_limits_memory_and_processors(tmp_path: Path, monkeypatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal:  1000000 kB\nMemFree: 5 kB\nMemAvailable:  800000 kB\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory.current": "1024\n",
        "/sys/fs/cgroup/cpu.max": "max 100000\n",
    }

    def fake(path: str) -> Path:
        file = tmp_path / path.strip("/").replace("/", "_")
        if path in files:
            file.write_text(files[path])
        return file

    class FakePath:
        def __new__(cls, path: str):
            return _Folder(path, fake)

    monkeypatch.setattr(machine, "Path", FakePath)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert machine.memory() == (1_000_000 * 1024, 800_000 * 1024)
    assert machine.cpus() == 8
    files["/sys/fs/cgroup/memory.max"] = "409600\n"
    files["/sys/fs/cgroup/memory.current"] = "102400\n"
    files["/sys/fs/cgroup/cpu.max"] = "250000 100000\n"
    assert machine.memory() == (409600, 307200)
    assert machine.cpus() == 2


class _Folder:
    """A path under an imagined root."""

    def __init__(self, path: str, fake) -> None:
        self._path, self._fake = path, fake

    def __truediv__(self, name: str) -> _Folder:
        return _Folder(f"{self._path}/{name}", self._fake)

    def exists(self) -> bool:
        return self._fake(self._path).exists()

    def read_text(self) -> str:
        return self._fake(self._path).read_text()


@pytest.mark.parametrize(
    ("configured", "capability", "expected"),
    [
        ("auto", None, "float32"),
        ("auto", (7, 5), "float16"),
        ("auto", (8, 0), "bfloat16"),
        ("auto", (9, 0), "bfloat16"),
        ("float32", (9, 0), "float32"),
        ("float64", None, "float64"),
    ],
)
def test_dtype_of_a_model_on_a_device(configured: str, capability: tuple[int, int] | None, expected: str):
    assert machine.dtype_name(configured, capability) == expected
