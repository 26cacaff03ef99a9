"""What the doctor sees and advises."""

from __future__ import annotations

import io
import json
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from posttrain.rl import doctor, machine
from posttrain.rl.doctor import Package, advise
from posttrain.rl.machine import GIB, MIB, Gpu

SMI = """0, GPU-aaaa-1, NVIDIA H200, 143771, 143000, 9.0, 570.1
1, GPU-bbbb-2, Tesla T4, 15360, 15000, 7.5, 570.1
2, GPU-aaab-3, NVIDIA A100, [N/A], [N/A], 8.0, 570.1
"""


@pytest.fixture
def smi(monkeypatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    done = subprocess.CompletedProcess([], 0, SMI, "")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: done)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_are_read_from_the_driver(smi) -> None:
    first, second, third = machine.gpus()
    assert first == Gpu(0, "NVIDIA H200", 143771 * MIB, 143000 * MIB, (9, 0), "570.1")
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


def test_the_report_names_what_is_really_installed() -> None:
    report = doctor.examine()
    found = {package.name: package for package in report.packages}
    assert found["transformers"].version == metadata.version("transformers")
    assert found["transformers"].fits and found["transformers"].wanted
    assert {package.extra for package in report.packages} - {""} == set(doctor.EXTRAS)
    assert report.torch_error is None
    assert report.cpus >= 1 and report.memory_total and report.memory_available
    assert report.memory_available <= report.memory_total
    assert json.loads(json.dumps(doctor.as_tree(report)))["cpus"] == report.cpus


def test_every_extra_is_one_that_the_package_offers() -> None:
    offered = set(metadata.metadata("posttrain").get_all("Provides-Extra") or [])
    assert set(doctor.EXTRAS) <= offered


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [("2.11.0", ">=2.11", True), ("2.13.0+cpu", ">=2.11", True), ("2.10.1", ">=2.11", False), ("3.0rc1", ">=2", True)],
)
def test_versions_are_compared_with_the_wanted_range(monkeypatch, version: str, wanted: str, fits: bool) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda _: version)
    assert doctor._package("torch", {"torch": wanted}) == Package("torch", version, wanted, fits)


def test_a_missing_package_has_no_version(monkeypatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    assert doctor._package("vllm", {"vllm": ">=0.26"}, "vllm", "speed") == Package(
        "vllm", None, ">=0.26", False, "vllm", "speed"
    )


def packages(*missing: str, old: str = "") -> list[Package]:
    core = [Package(name, None if name in missing else "9", ">=2", name != old) for name in ("torch", "triton", "peft")]
    extras = [Package(p, None if e in missing else "9", ">=2", True, e, g) for e, (p, g) in doctor.EXTRAS.items()]
    return core + extras


HOPPER = Gpu(0, "H", 80 * GIB, 80 * GIB, (9, 0), "1")
PASCAL = Gpu(0, "P", 8 * GIB, 8 * GIB, (6, 1), "1")


@pytest.mark.parametrize(
    ("found", "gpus", "cuda", "error", "threads", "expected"),
    [
        (packages(), [HOPPER], "12.8", None, None, []),
        (packages(), [], None, None, "1", []),
        (packages("triton", "wandb", "serve", "vllm", "bnb"), [], None, None, "1", []),
        (packages(), [], None, None, None, ["OMP_NUM_THREADS=1"]),
        (packages("peft"), [], None, None, "1", ['peft is missing: pip install "peft>=2"']),
        (packages(old="torch"), [], None, None, "1", ["torch 9 is outside what is tested"]),
        (packages(), [HOPPER], None, None, None, ["this torch has no CUDA"]),
        (packages(), [HOPPER], None, "libcudart missing", None, ["torch does not import (libcudart missing)"]),
        (packages(), [PASCAL], "12.8", None, None, ["older than Volta"]),
        (packages("vllm", "bnb"), [HOPPER], "12.8", None, None, ["posttrain[vllm]", "posttrain[bnb]"]),
        (packages("math"), [], None, None, "1", ["posttrain[math]"]),
    ],
)
def test_advice_names_the_next_step(found, gpus, cuda, error, threads, expected: list[str]) -> None:
    steps = advise(found, gpus, torch_cuda=cuda, torch_error=error, threads=threads)
    assert len(steps) == len(expected), steps
    assert all(part in step for part, step in zip(expected, steps))


def test_the_tables_show_gpu_and_advice_without_eating_brackets(monkeypatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [HOPPER])
    text = io.StringIO()
    doctor.show(doctor.examine(), Console(file=text, width=200))
    shown = text.getvalue()
    assert "GPU 0: H, 80.0 of 80.0 GiB free, compute capability 9.0 (fp16, bf16, fp8), driver 1" in shown
    if not doctor._package("vllm", {}).version:
        assert 'pip install "posttrain[vllm]"' in shown
