"""Runs programs that a model wrote, each in a process of its own that can reach nothing.

A program reads the Python installation, reads and writes one scratch folder, reads its standard input and prints. It
has no network, starts no process, signals nobody, and ends with its limits; whatever it does costs its own sample.
How that is enforced, and how well, is in ``README.md``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import marshal
import math
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards import sandbox_seccomp
from posttrain.rl.rewards.sandbox_watch import Killed, Watched, watch

log = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("sandbox_child.py")
_LANDLOCK_CREATE, _LANDLOCK_VERSION_FLAG = 444, 1
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/localtime")
_DATA = ("/usr/share/zoneinfo", "/dev/zero", "/dev/urandom", "/dev/random")
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # a program that prints a set of strings prints the same one each time
    "MALLOC_ARENA_MAX": "2",  # each arena takes 64 MiB of the address space, which is what the memory limit counts
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(slots=True, frozen=True)
class Limits:
    """What one program may use."""

    timeout_s: float = 10.0
    """Seconds of wall clock, the interpreter's start (about 0.03) included; the CPU time is held to the same."""
    memory_mib: int = 512
    """Address space, the interpreter's included."""
    output_kib: int = 1024
    """Of standard output, and of standard error."""
    scratch_mib: int = 64
    """All files of the scratch folder; one file at most a quarter of it."""
    packages: bool = False
    """Whether installed packages can be imported, beside the standard library."""


@dataclass(slots=True, frozen=True)
class Result:
    """How a program ended."""

    status: int
    """Exit status; negative: the signal it died of."""
    stdout: str
    stderr: str
    seconds: float
    killed: Killed | None
    """The limit it ran into, where that is why it ended."""

    @property
    def succeeded(self) -> bool:
        """Exit status 0 within the limits."""
        return self.status == 0 and self.killed is None


@dataclass(slots=True, frozen=True)
class Program:
    """Source and what it is given."""

    source: str
    stdin: str = ""
    descriptors: tuple[int, ...] = ()
    """File descriptors it inherits, beside the usual three, under the same numbers; closed here once it runs."""


@dataclass(slots=True, frozen=True)
class Isolation:
    """What keeps a program in, found by trying it (``isolation``)."""

    level: Literal["strong", "limited"]
    landlock: int = 0
    """Version of the kernel's Landlock, 0: none."""
    seccomp: bool = False
    bubblewrap: str | None = None
    """Path of ``bwrap``."""

    def __str__(self) -> str:
        parts = [
            "bubblewrap" if self.bubblewrap else "",
            f"Landlock {self.landlock}" if self.landlock else "",
            "seccomp" if self.seccomp else "audit hook",
            "resource limits",
        ]
        return f"{self.level} ({', '.join(filter(None, parts))})"


def run(
    program: Program | str, *, stdin: str = "", limits: Limits | None = None, isolation: Isolation | None = None
) -> Result:
    """Run a program to its end, or to a limit's. Blocks; ``threads`` runs many at once.

    ``isolation`` is what this machine has, unless given. Raises ``OSError`` only where no process can be started.
    """
    whole = program if isinstance(program, Program) else Program(program, stdin)
    return run_together([whole], limits=limits, isolation=isolation)[0]


def run_together(
    programs: Sequence[Program], *, limits: Limits | None = None, isolation: Isolation | None = None
) -> list[Result]:
    """Run programs side by side, each in a sandbox of its own; when the first ends, the others are killed."""
    limits, isolation = limits or Limits(), isolation or available()
    with contextlib.ExitStack() as stack:
        try:
            running = [stack.enter_context(_started(program, limits, isolation)) for program in programs]
        finally:  # or the ends of a pipe that a program holds would never be the last ones
            for descriptor in {descriptor for program in programs for descriptor in program.descriptors}:
                os.close(descriptor)
        watch(running, limits.timeout_s)
    return [
        Result(
            child.status if isolation.bubblewrap is None or child.status <= 128 else 128 - child.status,
            child.output[0].decode("utf-8", "replace"),
            child.output[1].decode("utf-8", "replace"),
            child.seconds,
            child.killed,
        )
        for child in running
    ]


@functools.cache
def available() -> Isolation:
    """The strongest isolation that held against a program that tries to get out; found once, and logged."""
    seccomp, landlock = sandbox_seccomp.supported(), _landlock_version()
    candidates = []
    if bubblewrap := shutil.which("bwrap"):
        candidates.append(Isolation("strong", landlock, seccomp, bubblewrap))
    if landlock:
        candidates.append(Isolation("strong", landlock, seccomp))
    found = next((candidate for candidate in candidates if seccomp and holds(candidate)), None)
    found = found or Isolation("limited", 0, seccomp and _runs(Isolation("limited", 0, seccomp)))
    log.info("programs run in a sandbox: isolation is %s", found)
    return found


def require_strong() -> None:
    """Raise ``RewardError`` unless the isolation here is strong."""
    if available().level != "strong":
        raise RewardError(
            f"require_isolation: this machine's sandbox is {available()}: install bubblewrap (apt install bubblewrap) "
            "where user namespaces are allowed, or use a Linux kernel with Landlock (5.13, lsm=landlock)"
        )


def holds(isolation: Isolation) -> bool:
    """Whether a program that writes and reads outside, connects, forks, executes and signals fails in all of it."""
    with tempfile.TemporaryDirectory(prefix="posttrain-probe-") as outside:
        secret = Path(outside, "secret")
        secret.write_text("secret")
        attempts = _PROBE.replace("OUTSIDE", repr(outside)).replace("PARENT", str(os.getpid()))
        result = run(attempts, limits=Limits(timeout_s=20), isolation=isolation)
        return result.succeeded and result.stdout == "inside: done\n" and [*Path(outside).iterdir()] == [secret]


def cores() -> int:
    """How many programs run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Where blocking runs are waited for: as many at once as there are cores, whoever asks."""
    return ThreadPoolExecutor(cores(), "sandbox")


_PROBE = """
import os, socket, sys
def attempt(name, function, *args):
    try:
        result = function(*args)
    except (OSError, RuntimeError):
        return
    print(name, "done")
    if name == "fork" and result == 0:
        os._exit(0)
open("file", "w").write("x")
print("inside: done")
attempt("write", open, os.path.join(OUTSIDE, "new"), "w")
attempt("overwrite", open, os.path.join(OUTSIDE, "secret"), "r+")
attempt("empty", os.open, os.path.join(OUTSIDE, "secret"), os.O_RDONLY | os.O_TRUNC)
attempt("read", open, os.path.join(OUTSIDE, "secret"))
attempt("delete", os.remove, os.path.join(OUTSIDE, "secret"))
attempt("mode", os.chmod, OUTSIDE, 0o777)
attempt("folder", os.mkdir, os.path.join(OUTSIDE, "folder"))
attempt("internet", socket.socket, socket.AF_INET, socket.SOCK_STREAM)
attempt("unix socket", socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM)
attempt("signal", os.kill, PARENT, 0)
attempt("environment", open, "/proc/PARENT/environ")
attempt("execute", os.execv, sys.executable, ["python", "-c", "print('execute done')"])
attempt("fork", os.fork)
"""


def _runs(isolation: Isolation) -> bool:
    return run("print('up')", isolation=isolation).stdout == "up\n"


@contextlib.contextmanager
def _started(program: Program, limits: Limits, isolation: Isolation) -> Iterator[Watched]:
    """A process that runs the program; closed on the way out."""
    scratch = Path(tempfile.mkdtemp(prefix="posttrain-sandbox-")).resolve()
    try:
        path = scratch / "program.py"
        path.write_bytes(program.source.encode("utf-8", "surrogatepass"))
        with tempfile.TemporaryFile() as stdin:
            stdin.write(program.stdin.encode("utf-8", "surrogatepass"))
            stdin.seek(0)
            process = subprocess.Popen(
                _command(path, limits, isolation),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=scratch,
                env=_ENVIRONMENT,
                pass_fds=program.descriptors,
                start_new_session=True,
            )
    except BaseException:
        shutil.rmtree(scratch)
        raise
    child = Watched(process, scratch, output_bytes=limits.output_kib << 10, scratch_bytes=limits.scratch_mib << 20)
    try:
        yield child
    finally:
        child.close()


def _command(path: Path, limits: Limits, isolation: Isolation) -> list[str]:
    """What starts ``sandbox_child.py``: an interpreter that runs no start-up code of any package, perhaps in bwrap."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    imports = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) if limits.packages else []
    scratch = str(path.parent)
    settings = {
        "program": str(path),
        "scratch": scratch,
        "parent": None if isolation.bubblewrap else os.getpid(),
        "readable": [*_readable(), *imports],
        "import_paths": imports,
        "cpu_s": math.ceil(limits.timeout_s) + 1,
        "memory_bytes": limits.memory_mib << 20,
        "file_bytes": (limits.scratch_mib << 20) // 4,
        "files": 64,
        "landlock": isolation.landlock,
        "seccomp": sandbox_seccomp.compiled(platform.machine()).hex() if isolation.seccomp else "",
        "audit": isolation.level != "strong",
    }
    # no user site, no site packages, no folder of the script, no byte code written, UTF-8 whatever the locale
    command = [python, "-s", "-S", "-P", "-B", "-X", "utf8", str(_CHILD), marshal.dumps(settings).hex()]
    if isolation.bubblewrap is None:
        return command
    # fmt: off
    box = [isolation.bubblewrap, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--dev", "/dev",
           "--ro-bind", sys.base_prefix, sys.base_prefix, "--ro-bind", str(_CHILD), str(_CHILD)]
    # fmt: on
    for readable in dict.fromkeys([*_readable(), *imports]):
        if not readable.startswith("/dev/"):
            box += ["--ro-bind-try", readable, readable]
    # the new root and /dev are memory: nothing may be written there
    box += ["--bind", scratch, scratch, "--chdir", scratch, "--remount-ro", "/dev", "--remount-ro", "/"]
    return [*box, *command]


def _readable() -> list[str]:
    """The standard library and what it loads."""
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"]
    return [*dict.fromkeys(os.path.realpath(path) for path in paths), *_LIBRARIES, *_DATA]


def _landlock_version() -> int:
    """Of the running kernel, 0 where it has none."""
    if sys.platform != "linux":
        return 0
    syscall = ctypes.CDLL(None).syscall
    syscall.restype = ctypes.c_long
    return max(0, int(syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), _LANDLOCK_VERSION_FLAG)))
