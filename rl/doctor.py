"""What is installed, what this machine can do, what to install next."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from posttrain import __version__
from posttrain.rl import machine
from posttrain.rl.footprint import estimate_memory, uses_vllm
from posttrain.rl.machine import GIB, Gpu
from posttrain.rl.memory import available, check_fits, settled, split

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.rl.config import Config

CORE = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "ray")
EXTRAS = {
    "vllm": ("vllm", "faster sampling on a GPU (rollout.engine = vllm)"),
    "bnb": ("bitsandbytes", "4-bit models and the 8-bit optimizer"),
    "wandb": ("wandb", "logging to Weights & Biases"),
    "tensorboard": ("tensorboard", "logging to TensorBoard"),
    "math": ("math-verify", "the math_answer reward on LaTeX"),
    "serve": ("fastapi", "the HTTP service"),
}
"""Extra → the distribution that shows it is there, and what it gives."""


@dataclass(slots=True, frozen=True)
class Package:
    """One distribution. ``extra`` is empty for what posttrain always needs."""

    name: str
    version: str | None
    wanted: str
    """Version range that posttrain asks for."""
    fits: bool
    extra: str = ""
    gives: str = ""


@dataclass(slots=True, frozen=True)
class Report:
    """The machine as found. Sizes in bytes."""

    posttrain: str
    python: str
    system: str
    packages: tuple[Package, ...]
    gpus: tuple[Gpu, ...]
    cpus: int
    memory_total: int | None
    memory_available: int | None
    omp_num_threads: str | None
    torch_cuda: str | None
    """CUDA version that torch was built for; ``None`` for a CPU build, or where torch does not import."""
    torch_error: str | None
    weight_sharing: str | None
    """Why vLLM and the trainer cannot share one copy of the weights here; ``None``: they can."""
    advice: tuple[str, ...]
    """What to do next, the most useful first."""


def examine() -> Report:
    """Look at everything; imports torch, creates no CUDA context."""
    ranges = _wanted_ranges()
    packages = [_package(name, ranges) for name in CORE]
    packages += [_package(name, ranges, extra, gives) for extra, (name, gives) in EXTRAS.items()]
    gpus = machine.gpus()
    main = machine.memory()
    torch_cuda, torch_error = _torch_build()
    threads = os.environ.get("OMP_NUM_THREADS")
    return Report(
        posttrain=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=tuple(packages),
        gpus=tuple(gpus),
        cpus=machine.cpus(),
        memory_total=main[0] if main else None,
        memory_available=main[1] if main else None,
        omp_num_threads=threads,
        torch_cuda=torch_cuda,
        torch_error=torch_error,
        weight_sharing=_no_sharing(packages, gpus),
        advice=tuple(advise(packages, gpus, torch_cuda=torch_cuda, torch_error=torch_error, threads=threads)),
    )


def advise(
    packages: list[Package], gpus: list[Gpu], *, torch_cuda: str | None, torch_error: str | None, threads: str | None
) -> list[str]:
    """What to do next, the most useful first; empty when nothing is left to do."""
    steps = []
    for package in packages:
        if package.version is None and not package.extra and package.name != "triton":
            steps.append(f'{package.name} is missing: pip install "{package.name}{package.wanted}"')
        elif package.version is not None and not package.fits:
            wanted = f'pip install "{package.name}{package.wanted}"'
            steps.append(f"{package.name} {package.version} is outside what is tested: {wanted}")
    if torch_error:
        steps.append(f"torch does not import ({torch_error}): install it again")
    missing = {package.extra for package in packages if package.extra and package.version is None}
    if gpus:
        if not torch_cuda and not torch_error:
            steps.append("this torch has no CUDA, so the GPU lies idle: pip install torch (the build for your CUDA)")
        oldest = min((gpu.capability for gpu in gpus if gpu.capability), default=None)
        if oldest is not None and oldest < (7, 0):
            steps.append("this GPU is older than Volta, which Triton does not support: set kernels to reference")
        steps += [_install(extra) for extra in ("vllm", "bnb") if extra in missing]
    elif threads is None:
        steps.append(
            "no GPU: set OMP_NUM_THREADS=1 for small models; for larger ones the number of idle cores, "
            "with OMP_WAIT_POLICY=PASSIVE"
        )
    if "math" in missing:
        steps.append(_install("math"))
    return steps


def fit(config: Config) -> str:
    """How the memory of this machine is divided for ``config``; raises ``PosttrainError`` where it does not fit."""
    memory = available(config.trainer.device, config.gpus)
    if memory is not None and memory.kind == "cuda" and uses_vllm(config, on_gpu=True):
        return f"fits: {split(config, memory).describe()}"
    check_fits(config, memory)
    config = settled(config, memory)
    return f"fits; with every prompt and completion at its limit: {estimate_memory(config, memory).describe()}"


def as_tree(report: Report) -> dict[str, Any]:
    """Plain dict for JSON."""
    tree = asdict(report)
    for gpu, shown in zip(report.gpus, tree["gpus"], strict=True):
        shown["dtypes"] = gpu.dtypes
    return tree


def show(report: Report, console: Console | None = None) -> None:
    """Print tables, then what to do next."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False)
    console.print(f"posttrain {report.posttrain}, Python {report.python}, {report.system}", markup=False)
    table = Table(title="installed", title_justify="left")
    for heading in ("package", "version", "wanted", "extra", "gives"):
        table.add_column(heading)
    for package in report.packages:
        mark = "" if package.fits else " (!)" if package.version else ""
        table.add_row(package.name, (package.version or "–") + mark, package.wanted, package.extra, package.gives)
    console.print(table)
    for gpu in report.gpus:
        console.print(_gpu_line(gpu), markup=False)
        for process in gpu.processes:
            console.print(f"  {process.describe()}", markup=False)
    if not report.gpus:
        console.print("no GPU: sampling and training run on the CPU", markup=False)
    elif report.torch_cuda:
        console.print(f"torch is built for CUDA {report.torch_cuda}", markup=False)
    if report.gpus:
        sharing = f"no: {report.weight_sharing}" if report.weight_sharing else "yes"
        console.print(f"one copy of the weights for vLLM and the trainer: {sharing}", markup=False)
    console.print(_cpu_line(report), markup=False)
    for step in report.advice:
        console.print(f"→ {step}", markup=False)
    if not report.advice:
        console.print("nothing to do: everything this machine can use is installed", markup=False)


def _no_sharing(packages: list[Package], gpus: list[Gpu]) -> str | None:
    installed = {package.name for package in packages if package.version is not None}
    if not gpus:
        return "there is no GPU"
    return machine.no_weight_sharing() if "vllm" in installed else "vLLM is not installed"


def _gpu_line(gpu: Gpu) -> str:
    size = f"{gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free" if gpu.free and gpu.total else "memory unknown"
    capability = "{}.{}".format(*gpu.capability) if gpu.capability else "unknown"
    formats = ", ".join(gpu.dtypes) or "float32 only"
    return f"GPU {gpu.index}: {gpu.name}, {size}, compute capability {capability} ({formats}), driver {gpu.driver}"


def _cpu_line(report: Report) -> str:
    size = ""
    if report.memory_total and report.memory_available:
        size = f", {report.memory_available / GIB:.1f} of {report.memory_total / GIB:.1f} GiB available"
    return f"CPU: {report.cpus} cores{size}, OMP_NUM_THREADS {report.omp_num_threads or 'not set'}"


def _install(extra: str) -> str:
    return f'{EXTRAS[extra][1]}: pip install "posttrain[{extra}]"'


def _package(name: str, ranges: dict[str, str], extra: str = "", gives: str = "") -> Package:
    from packaging.specifiers import SpecifierSet

    wanted = ranges.get(name, "")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, None, wanted, False, extra, gives)
    return Package(name, version, wanted, SpecifierSet(wanted).contains(version, prereleases=True), extra, gives)


def _wanted_ranges() -> dict[str, str]:
    """Distribution → version range, from posttrain's own metadata."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("posttrain") or []
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return {}
    requirements = [Requirement(line) for line in lines]
    return {item.name: str(item.specifier) for item in requirements if item.name != "posttrain" and item.specifier}


def _torch_build() -> tuple[str | None, str | None]:
    """CUDA version of torch, and why torch does not import."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library it needs is missing or broken
        return None, str(error).partition("\n")[0]
    return torch.version.cuda, None
