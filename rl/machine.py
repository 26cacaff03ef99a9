"""What this machine has, asked without torch: memory, processors, GPUs. Sizes in bytes."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MIB = 2**20
GIB = 2**30


@dataclass(slots=True, frozen=True)
class Process:
    """A process that holds GPU memory; ``used`` is ``None`` where the driver does not tell."""

    pid: int
    name: str
    """Of its program; empty where the driver does not tell."""
    used: int | None

    def describe(self) -> str:
        """Who holds how much."""
        who = f"process {self.pid} {self.name}".rstrip()
        return f"{who} holds {gib(self.used)}" if self.used is not None else f"{who} holds some of it"


@dataclass(slots=True, frozen=True)
class Claim:
    """What a run of ours may take of a GPU at its peak, held now or not (``rl.claims``)."""

    pid: int
    started: str
    """When its process started, as the system counts: an id alone may be given out again."""
    size: int
    run: str
    """Its folder."""

    def describe(self) -> str:
        """Who may take how much."""
        return f"the run of process {self.pid} ({self.run}) may take {gib(self.size)}"


@dataclass(slots=True, frozen=True)
class Memory:
    """What there is to fill."""

    kind: Literal["cpu", "cuda"]
    name: str
    total: int
    free: int
    """Of a GPU, what is neither held nor claimed by another run."""
    capability: tuple[int, int] | None = None
    index: int = 0
    """Of a GPU, as the driver counts them."""
    processes: tuple[Process, ...] = ()
    """That hold some of it; empty where the driver does not tell, as in containers."""
    claims: tuple[Claim, ...] = ()
    """Of other runs."""


@dataclass(slots=True, frozen=True)
class Gpu:
    """One GPU as the driver sees it; ``None`` where the driver gives no figure (MIG slices)."""

    index: int
    name: str
    total: int | None
    free: int | None
    capability: tuple[int, int] | None
    driver: str
    processes: tuple[Process, ...] = ()
    """That hold some of its memory; empty where the driver does not tell, as in containers."""
    uuid: str = ""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What its tensor cores multiply: fp16 from Volta, bf16 from Ampere, fp8 from Ada, fp4 from Blackwell."""
        known = self.capability or (0, 0)
        since = (("fp16", (7, 0)), ("bf16", (8, 0)), ("fp8", (8, 9)), ("fp4", (10, 0)))
        return tuple(name for name, least in since if known >= least)


def gpus() -> list[Gpu]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves visible, in its order; empty without a driver.

    Asking the driver's own tool costs no CUDA context, half a gibibyte of the memory that is being counted.
    """
    fields = "index,uuid,name,memory.total,memory.free,compute_cap,driver_version"
    answer = _ask_driver(f"--query-gpu={fields}")
    if not answer:
        return []
    holders = _processes()
    found = dict(_gpu(line, holders) for line in answer if line.count(",") >= 6)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(found.values())
    chosen: list[Gpu] = []
    for wanted in visible.split(","):
        match = [gpu for uuid, gpu in found.items() if wanted == str(gpu.index) or (wanted and uuid.startswith(wanted))]
        if len(match) != 1:  # CUDA stops at the first entry it does not know
            break
        chosen += match
    return chosen


def _ask_driver(query: str) -> list[str]:
    """Lines of the driver's answer; none without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _gpu(line: str, holders: dict[str, list[Process]]) -> tuple[str, Gpu]:
    index, uuid, name, total, free, capability, driver = (part.strip() for part in line.split(",", 6))
    major, _, minor = capability.partition(".")
    known = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    return uuid, Gpu(int(index), name, _mib(total), _mib(free), known, driver, tuple(holders.get(uuid, ())), uuid)


def _processes() -> dict[str, list[Process]]:
    """GPU → the processes that hold its memory, the largest first. Other containers' have no names."""
    found: dict[str, list[Process]] = {}
    for line in _ask_driver("--query-compute-apps=gpu_uuid,pid,used_memory,process_name"):
        parts = [part.strip() for part in line.split(",", 3)]
        if len(parts) == 4 and parts[1].isdigit():
            name = "" if parts[3].startswith("[") else parts[3].rpartition("/")[2]
            found.setdefault(parts[0], []).append(Process(int(parts[1]), name, _mib(parts[2])))
    return {uuid: sorted(holders, key=lambda process: -(process.used or 0)) for uuid, holders in found.items()}


def _mib(text: str) -> int | None:
    return int(text) * MIB if text.isdigit() else None


def gib(size: int) -> str:
    """A size for people."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB // 100 else f"{size / MIB:.2f} MiB"


def no_weight_sharing() -> str | None:
    """Why two processes of this machine cannot hold the same GPU memory, and what to do; ``None``: they can."""
    if platform.system() != "Linux" or "microsoft" in platform.release().lower():
        return "CUDA IPC needs Linux, and not WSL: use rollout.engine = transformers"
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(variable, "").lower():
            return f"{variable} asks for expandable_segments, which vLLM's sleep mode excludes: leave it out"
    return None


def process_stat(pid: int) -> tuple[int, str] | None:
    """Parent and start time; ``None`` for a process that is gone or a zombie, and where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19])


def cpus() -> int:
    """Processors this process may use: its affinity, cut by a container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _first_line(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit():
        allowed = min(allowed, max(1, round(int(quota[0]) / int(quota[1]))))
    return allowed


def memory() -> tuple[int, int] | None:
    """Main memory (total, available), cut by a container's limit; ``None`` where the system does not tell."""
    info = {}
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            key, _, value = line.partition(":")
            info[key] = int(value.split()[0]) * 1024
    if "MemAvailable" not in info:
        return None
    total, available = info["MemTotal"], info["MemAvailable"]
    limit, used = (_first_line(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        total = min(total, int(limit))
        available = min(available, max(0, int(limit) - int(used)))
    return total, available


def _first_line(path: Path) -> str:
    return path.read_text().partition("\n")[0].strip() if path.exists() else ""


def dtype_name(configured: str, capability: tuple[int, int] | None) -> str:
    """``model.dtype`` on a device of that compute capability (``None``: a CPU).

    auto: bfloat16 from Ampere on, float16 on older GPUs, float32 on a CPU.
    """
    if configured != "auto":
        return configured
    if capability is None:
        return "float32"
    return "bfloat16" if capability >= (8, 0) else "float16"
