"""What the doctor sees and advises."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from importlib import metadata

import pytest
from rich.console import Console

from posttrain.rl import doctor, machine
from posttrain.rl.doctor import Package, advise
from posttrain.rl.errors import ConfigError
from posttrain.rl.machine import GIB, Gpu, Process
from tests.rl.architectures import QWEN3_4B, SMALL, configured


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


def shown(monkeypatch, gpus: list[Gpu]) -> str:
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    text = io.StringIO()
    doctor.show(doctor.examine(), Console(file=text, width=200))
    return text.getvalue()


def test_the_tables_show_who_holds_a_gpu(monkeypatch) -> None:
    holders = (Process(1234, "python3", 70 * GIB), Process(77, "", None))
    text = shown(monkeypatch, [replace(HOPPER, free=9 * GIB, processes=holders)])
    assert "GPU 0: H, 9.0 of 80.0 GiB free" in text
    assert "  process 1234 python3 holds 70.00 GiB\n  process 77 holds some of it\n" in text


@pytest.mark.parametrize(
    ("missing", "gpus", "variable", "verdict"),
    [
        ((), [HOPPER], "", None),
        (("vllm",), [HOPPER], "", "vLLM is not installed"),
        ((), [], "", "there is no GPU"),
        ((), [HOPPER], "expandable_segments:True", "PYTORCH_ALLOC_CONF asks for expandable_segments"),
    ],
)
def test_the_doctor_knows_whether_weights_can_be_shared(monkeypatch, missing, gpus, variable: str, verdict) -> None:
    monkeypatch.setattr(doctor, "_package", lambda name, *_: Package(name, None if name in missing else "9", "", True))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", variable)
    text = shown(monkeypatch, gpus)
    line = next((line for line in text.splitlines() if line.startswith("one copy of the weights")), None)
    found = doctor.examine().weight_sharing
    if verdict is None:
        assert found is None and line == "one copy of the weights for vLLM and the trainer: yes"
    else:
        assert found is not None and found.startswith(verdict)
        assert line == (f"one copy of the weights for vLLM and the trainer: no: {found}" if gpus else None)


def test_a_configuration_is_fitted_to_the_machine(monkeypatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [HOPPER])
    rollout = {"prompts_per_step": 4, "group_size": 8}
    told = doctor.fit(configured(QWEN3_4B, rollout={**rollout, "engine": "vllm"}, gpu_memory_gib=64))
    assert told.startswith("fits: 4,022M parameters") and "64.00 GiB to share: weights 7.49 GiB" in told
    told = doctor.fit(configured(SMALL, rollout={**rollout, "engine": "transformers"}))
    assert told.startswith("fits; with every prompt and completion at its limit: ") and "KV cache" in told
    with pytest.raises(ConfigError, match="does not fit into"):
        doctor.fit(configured(QWEN3_4B, rollout={**rollout, "engine": "vllm"}, gpu_memory_gib=8))


def test_the_tables_show_gpu_and_advice_without_eating_brackets(monkeypatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [HOPPER])
    text = io.StringIO()
    doctor.show(doctor.examine(), Console(file=text, width=200))
    shown = text.getvalue()
    assert "GPU 0: H, 80.0 of 80.0 GiB free, compute capability 9.0 (fp16, bf16, fp8), driver 1" in shown
    if not doctor._package("vllm", {}).version:
        assert 'pip install "posttrain[vllm]"' in shown
