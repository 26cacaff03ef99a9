"""Programs that mean harm: each costs its own run, and leaves no process and no file."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards import sandbox, sandbox_seccomp, sandbox_watch
from posttrain.rl.rewards.process_tree import descendants
from posttrain.rl.rewards.sandbox import Isolation, Limits, Program, run

LINUX = sys.platform == "linux"
LANDLOCK = sandbox._landlock_version()
STRONG = Isolation("strong", LANDLOCK, seccomp=True)
LIMITED = Isolation("limited")
BOXES = [
    pytest.param(STRONG, id="landlock", marks=pytest.mark.skipif(not sandbox.holds(STRONG), reason="no Landlock here")),
]
if bwrap := shutil.which("bwrap"):
    without_landlock = Isolation("strong", 0, seccomp=True, bubblewrap=bwrap)
    unavailable = not sandbox.holds(without_landlock)
    BOXES.append(
        pytest.param(without_landlock, id="bubblewrap", marks=pytest.mark.skipif(unavailable, reason="no namespaces"))
    )
strong = pytest.mark.parametrize("box", BOXES)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch folders go below ``tmp_path``; afterwards there is none, and no process below this one."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = set(descendants(os.getpid()))
    yield
    assert list(scratch.iterdir()) == []
    assert set(descendants(os.getpid())) <= before


def test_input_output_status_and_arguments_are_those_of_a_program_of_its_own() -> None:
    source = (
        "import sys, os\nprint(input()[::-1], __name__, sys.argv[1:], sorted(os.listdir()))\n"
        "print('no', file=sys.stderr)\nif __name__ == '__main__':\n    sys.exit(3)"
    )
    result = run(source, stdin="añb\nrest")
    assert (result.status, result.killed, result.succeeded) == (3, None, False)
    assert (result.stdout, result.stderr) == ("bña __main__ [] ['program.py']\n", "no\n")


HARMLESS = {
    "its own files": ("open('a', 'w').write('xy')\nprint(len(open('a').read()))\nimport os\nos.remove('a')", "2\n"),
    "temporary file": ("import tempfile\nf = tempfile.TemporaryFile()\nprint(f.write(b'xyz'))", "3\n"),
    "event loop": (
        "import asyncio\nasync def f():\n    await asyncio.sleep(.01)\n    print(7)\nasyncio.run(f())",
        "7\n",
    ),
    "deep recursion in a thread": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
        "def f(n):\n    return n and 1 + f(n - 1)\n"
        "t = threading.Thread(target=lambda: print(f(50000)))\nt.start(); t.join()",
        "50000\n",
    ),
    "late imports": (
        "import sqlite3, ssl, decimal, zoneinfo, statistics, hashlib, heapq, random, uuid, lzma\n"
        "print(statistics.median([3, 1, 2]), hashlib.md5(b'').hexdigest()[:8])",
        "2 d41d8cd9\n",
    ),
    "fast input": ("import os, io\nprint(sum(map(int, io.BytesIO(os.read(0, os.fstat(0).st_size)))))", "42\n"),
    "same order of a set each time": (
        "print(list({'a', 'b', 'c', 'd'}) == sorted({'a', 'b', 'c', 'd'}, key=list({'a', 'b', 'c', 'd'}).index))",
        "True\n",
    ),
}


@pytest.mark.parametrize("box", [*BOXES, pytest.param(LIMITED, id="limited")])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_honest_programs_do_works(name: str, box: Isolation) -> None:
    if name.startswith("deep") and box.level == "limited" and os.getuid() != 0:
        pytest.skip("without seccomp the limit on processes allows no thread")
    source, printed = HARMLESS[name]
    result = run(source, stdin="40\n2\n", isolation=box)
    assert (result.stdout, result.status) == (printed, 0), result.stderr


FOREVER = {
    "sleeps": ("import time\ntime.sleep(1e6)", "time"),
    "computes": ("while True: pass", "time"),
    "ignores signals": (
        "import signal\nfor n in (1, 2, 3, 13, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "time",
    ),
    "closes its pipes and sleeps": ("import os, time\nos.close(1); os.close(2)\ntime.sleep(1e6)", "time"),
    "prints": ("while True: print('x' * 100000)", "output"),
    "prints errors": ("import sys\nwhile True: sys.stderr.write('x' * 100000)", "output"),
    "fills the disk": ("i = 0\nwhile True:\n    open(str(i), 'wb').write(bytes(16 << 20)); i += 1", "files"),
    "makes files": ("i = 0\nwhile True:\n    open(str(i), 'w'); i += 1", "files"),
    "starts threads": (
        "import threading, time\nthreading.stack_size(32768)\nwhile True:\n"
        "    threading.Thread(target=time.sleep, args=(1e6,)).start()",
        "threads",
    ),
}


@strong
@pytest.mark.parametrize("name", FOREVER)
def test_what_does_not_end_is_ended_for_its_reason(name: str, box: Isolation) -> None:
    source, reason = FOREVER[name]
    began = time.monotonic()
    result = run(source, limits=Limits(timeout_s=1 if reason == "time" else 15), isolation=box)
    assert (result.killed, result.succeeded) == (reason, False), result
    assert time.monotonic() - began < 15
    assert len(result.stdout) <= 1 << 20 and len(result.stderr) <= 1 << 20


@pytest.mark.parametrize(("output_kib", "printed"), [(1, 1024), (3, 3072)])
def test_output_is_kept_up_to_its_limit(output_kib: int, printed: int) -> None:
    result = run("print('x' * 10**6)", limits=Limits(output_kib=output_kib))
    assert result.stdout == "x" * printed and result.killed == "output"


REFUSED = {
    "forks": ("os.fork()", "PermissionError"),
    "forks by spawning": ("os.posix_spawn(sys.executable, ['python'], {})", "PermissionError"),
    "starts a command": ("import subprocess; subprocess.run(['true'])", "PermissionError"),
    "becomes another program": ("os.execv(sys.executable, ['python', '-c', 'print(1)'])", "PermissionError"),
    "starts a process past Python": ("import ctypes; assert ctypes.CDLL(None).fork() < 0; raise PermissionError", ""),
    "opens a socket": ("import socket; socket.socket()", "PermissionError"),
    "opens a local socket": ("import socket; socket.socket(socket.AF_UNIX)", "PermissionError"),
    "sends to a local socket": (
        "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '/dev/log')",
        "PermissionError",
    ),
    "kills its parent": ("os.kill(os.getppid(), 9)", "PermissionError"),
    "kills everything": ("os.kill(-1, 9)", "PermissionError"),
    "has signals sent": ("import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())", "PermissionError"),
    "takes a larger memory limit": (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)",
        "not allowed to raise maximum limit",
    ),
    "limits its parent": (
        "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "PermissionError",
    ),
    "allocates 10 GiB": ("bytearray(10 << 30)", "MemoryError"),
    "allocates 10 GiB as a map": ("import mmap; mmap.mmap(-1, 10 << 30)", "Cannot allocate memory"),
    "keeps memory in a file": ("os.memfd_create('x')", "PermissionError"),
    "writes a file too large": ("open('a', 'wb').write(bytes(17 << 20))", "File too large"),
    "makes folders": ("os.mkdir('a')", "PermissionError"),
    "makes a link to the outside": ("os.symlink('/etc/passwd', 'a')", "PermissionError"),
    "writes to /": ("open('/posttrain-was-here', 'w')", "Error"),
    "writes to home": ("open(os.path.join('HOME', 'posttrain-was-here'), 'w')", "Error"),
    "overwrites a file": ("open('OUTSIDE', 'r+').write('x')", "Error"),
    "empties a file": ("os.open('OUTSIDE', os.O_RDONLY | os.O_TRUNC)", "Error"),
    "deletes a file": ("os.remove('OUTSIDE')", "Error"),
    "moves a file in": ("os.rename('OUTSIDE', 'a')", "Error"),
    "links a file in": ("os.link('OUTSIDE', 'a')", "PermissionError"),
    "changes a mode": ("os.chmod('OUTSIDE', 0)", "PermissionError"),
    "changes a time": ("os.utime('OUTSIDE', (0, 0))", "PermissionError"),
    "reads a file": ("print(open('OUTSIDE').read())", "Error"),
    "lists a folder": (
        "if 'outside.txt' in os.listdir(os.path.dirname('OUTSIDE')): print('seen')\nraise PermissionError",
        "PermissionError",
    ),
    "reads its parent's environment": ("print(open(f'/proc/{os.getppid()}/environ').read())", "Error"),
    "reads its parent's memory": ("open(f'/proc/{os.getppid()}/mem', 'rb').read(1)", "Error"),
    "not Python": ("print('a", "SyntaxError"),
    "a NUL": ("print('\0')", "null bytes"),
    "half a character": ("print('\ud800')", "SyntaxError"),
    "too deep": ("-" * 100_000 + "1", "Error"),
}


@strong
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_may_not_do_fails_there_and_changes_nothing(name: str, box: Isolation, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    before = outside.stat()
    source, error = REFUSED[name]
    home = str(Path.home())
    source = source.replace("OUTSIDE", str(outside)).replace("HOME", home)
    result = run(f"import os, sys\n{source}" if not error.endswith("bytes") else source, isolation=box)
    assert result.status == 1 and result.killed is None and result.stdout == "", result
    assert error in result.stderr.splitlines()[-1]
    after = outside.stat()
    assert outside.read_text() == "secret"
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (before.st_mode, before.st_mtime_ns, before.st_nlink)
    assert not Path("/posttrain-was-here").exists() and not Path(home, "posttrain-was-here").exists()


@strong
def test_no_secret_of_the_environment_goes_in(box: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hush")
    result = run("import os; print(sorted(os.environ), 'hush' in str(os.environ))", isolation=box)
    names = ["LANG", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED"]
    assert result.stdout.replace("'LC_CTYPE', ", "").replace("'PWD', ", "") in (
        f"{names} False\n",
        f"{sorted([*names, 'PWD'])} False\n",
    )


@pytest.mark.parametrize("status", [0, 7])
def test_an_abrupt_end_is_reported_as_it_was(status: int) -> None:
    result = run(f"import os\nprint('lost')\nos._exit({status})")
    assert (result.status, result.stdout, result.killed) == (status, "", None)


def test_a_crash_of_the_interpreter_is_a_signal() -> None:
    result = run("import ctypes\nctypes.string_at(0)")
    assert (result.status, result.succeeded) == (-signal.SIGSEGV, False)


@pytest.mark.skipif(not LANDLOCK, reason="no Landlock here")
@pytest.mark.parametrize(
    ("box", "held"),
    [
        (Isolation("strong", LANDLOCK, seccomp=True), True),
        (Isolation("strong", 0, seccomp=True), False),  # files stay open to it
        (Isolation("strong", LANDLOCK, seccomp=False), False),  # processes, sockets and modes do
    ],
)
def test_the_probe_finds_what_is_missing(box: Isolation, held: bool) -> None:
    assert sandbox.holds(box) is held


@pytest.mark.parametrize(
    "source",
    [
        "open('OUTSIDE', 'w')",
        "open('OUTSIDE')",
        "import os; os.remove('OUTSIDE')",
        "import os; os.rename('OUTSIDE', 'a')",
        "import os; os.rename('program.py', 'OUTSIDE')",
        "import os; os.chmod('OUTSIDE', 0)",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 0)",
        "import subprocess; subprocess.run(['true'])",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.socket()",
        "import ctypes; ctypes.CDLL(None)",
    ],
)
def test_the_limited_level_refuses_what_python_announces(source: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    result = run(source.replace("OUTSIDE", str(outside)), isolation=LIMITED)
    assert result.status == 1 and "PermissionError: the sandbox refuses" in result.stderr, result
    assert outside.read_text() == "secret"


def test_limits_hold_at_the_limited_level() -> None:
    assert "MemoryError" in run("bytearray(10 << 30)", isolation=LIMITED).stderr or not LINUX
    assert run("while True: pass", limits=Limits(timeout_s=0.5), isolation=LIMITED).killed == "time"
    assert run("while True: print('x' * 9999)", isolation=LIMITED).killed == "output"


def test_required_isolation_that_is_not_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: LIMITED)
    with pytest.raises(RewardError, match=r"limited \(audit hook, resource limits\): install bubblewrap"):
        sandbox.require_strong()


def test_the_level_is_found_once_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    sandbox.available.cache_clear()
    with caplog.at_level("INFO", sandbox.__name__):
        found = [sandbox.available() for _ in range(3)]
    assert found[0] is found[1] is found[2]
    lines = [record.message for record in caplog.records if record.name == sandbox.__name__]
    assert lines == [f"programs run in a sandbox: isolation is {found[0]}"]


def test_the_first_of_several_programs_ends_the_others() -> None:
    read, write = os.pipe()
    began = time.monotonic()
    first, second = sandbox.run_together(
        [
            Program(f"import os\nprint(os.read({read}, 9).decode())", descriptors=(read,)),
            Program(f"import os, time\nos.write({write}, b'hello')\ntime.sleep(1e6)", descriptors=(write,)),
        ]
    )
    assert (first.stdout, first.succeeded) == ("hello\n", True)
    assert second.status == -signal.SIGKILL and time.monotonic() - began < 5
    for descriptor in (read, write):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.skipif(not LINUX, reason="a process here does not end with its parent")
@strong
def test_a_program_ends_with_the_process_that_ran_it(box: Isolation, tmp_path: Path) -> None:
    call = f"sandbox.run('while True: pass', limits=sandbox.Limits(timeout_s=60), isolation=sandbox.{box!r})"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"from posttrain.rl.rewards import sandbox\n{call}"],
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
    )
    deadline = time.monotonic() + 20
    while not (below := descendants(parent.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    below = descendants(parent.pid)
    parent.kill()
    parent.wait()
    while any(_runs(pid) for pid in below) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert below and not any(_runs(pid) for pid in below)
    [folder] = (tmp_path / "scratch").iterdir()  # nobody was there to remove it
    shutil.rmtree(folder)


def test_a_folder_deeper_than_recursion_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "deep"
    top.mkdir()
    monkeypatch.chdir(top)
    for _ in range(1500):
        Path("d").mkdir()
        os.chdir("d")
    os.chdir(tmp_path)
    sandbox_watch._remove(top)
    assert not top.exists()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


ALLOWED, UNPERMITTED, UNKNOWN, KILLED = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def decide(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the kernel would do: the classic BPF machine with the four instructions that the filter uses."""
    words = [number, architecture or AUDIT[machine], 0, 0]
    for argument in (*arguments, *[0] * (6 - len(arguments))):
        words += [argument & 0xFFFFFFFF, argument >> 32]
    accumulator, position, filter_ = 0, 0, sandbox_seccomp.program(machine)
    while True:
        code, if_true, if_false, value = filter_[position]
        position += 1
        if code == 0x20:
            accumulator = words[value // 4]
        elif code == 0x54:
            accumulator &= value
        elif code == 0x15:
            position += if_true if accumulator == value else if_false
        else:
            assert code == 0x06
            return value


@pytest.mark.parametrize(
    ("call", "x86_64", "aarch64", "arguments", "decision"),
    [
        ("read", 0, 63, (), ALLOWED),
        ("openat for reading", 257, 56, (0, 0, os.O_RDONLY | os.O_CLOEXEC), ALLOWED),
        ("openat for writing", 257, 56, (0, 0, 0o1 | 0o1000), ALLOWED),
        ("openat that empties", 257, 56, (0, 0, 0o1000 | 0o2000000), UNPERMITTED),
        ("openat2", 437, 437, (), UNKNOWN),
        ("clone of a thread", 56, 220, (0x3D0F00,), ALLOWED),
        ("clone of a process", 56, 220, (0x1200011,), UNPERMITTED),
        ("clone of a thread in a namespace", 56, 220, (0x10000 | 0x10000000,), UNPERMITTED),
        ("clone3", 435, 435, (), UNKNOWN),
        ("execve", 59, 221, (), UNPERMITTED),
        ("kill", 62, 129, (), UNPERMITTED),
        ("tgkill", 234, 131, (), UNPERMITTED),
        ("socket", 41, 198, (), UNPERMITTED),
        ("connect", 42, 203, (), UNPERMITTED),
        ("socketpair of AF_UNIX", 53, 199, (1,), ALLOWED),
        ("socketpair of AF_NETLINK", 53, 199, (16,), UNPERMITTED),
        ("sendto the other end", 44, 206, (3, 1, 1, 0, 0), ALLOWED),
        ("sendto an address", 44, 206, (3, 1, 1, 0, 0x1000), UNPERMITTED),
        ("sendto a high address", 44, 206, (3, 1, 1, 0, 1 << 32), UNPERMITTED),
        ("sendmsg", 46, 211, (), UNPERMITTED),
        ("mkdirat", 258, 34, (), UNPERMITTED),
        ("fchmodat", 268, 53, (), UNPERMITTED),
        ("ptrace", 101, 117, (), UNPERMITTED),
        ("process_vm_readv", 310, 270, (), UNPERMITTED),
        ("memfd_create", 319, 279, (), UNPERMITTED),
        ("io_uring_setup", 425, 425, (), UNPERMITTED),
        ("unshare", 272, 97, (), UNPERMITTED),
        ("mount", 165, 40, (), UNPERMITTED),
        ("bpf", 321, 280, (), UNPERMITTED),
        ("ioctl TCGETS", 16, 29, (1, 0x5401), ALLOWED),
        ("ioctl FIOSETOWN", 16, 29, (1, 0x8901), UNPERMITTED),
        ("ioctl TIOCSTI", 16, 29, (1, 0x5412), UNPERMITTED),
        ("fcntl F_DUPFD_CLOEXEC", 72, 25, (1, 1030), ALLOWED),
        ("fcntl F_SETFD", 72, 25, (1, 2), ALLOWED),
        ("fcntl F_SETOWN", 72, 25, (1, 8), UNPERMITTED),
        ("prctl PR_SET_NAME", 157, 167, (15,), ALLOWED),
        ("prctl PR_SET_PDEATHSIG", 157, 167, (1,), UNPERMITTED),
        ("prlimit64 of itself", 302, 261, (0,), ALLOWED),
        ("prlimit64 of another", 302, 261, (1,), UNPERMITTED),
        ("exit_group", 231, 94, (), ALLOWED),
        ("one of tomorrow", 9999, 9999, (), UNPERMITTED),
    ],
)
def test_the_filter_decides_each_call(
    call: str, x86_64: int, aarch64: int, arguments: tuple[int, ...], decision: int
) -> None:
    found = (decide("x86_64", x86_64, *arguments), decide("aarch64", aarch64, *arguments))
    assert found == (decision, decision), call


def test_the_filter_kills_a_process_that_calls_in_the_manner_of_another_machine() -> None:
    assert decide("x86_64", 0, architecture=0x40000003) == KILLED  # 32 bits: other numbers
    assert decide("x86_64", 0x40000000) == UNPERMITTED  # x32's read
    assert decide("aarch64", 63, architecture=0x40000028) == KILLED


@pytest.mark.skipif(platform.machine() not in AUDIT or not LINUX, reason="no filter for this machine")
def test_the_filter_fits_the_kernel() -> None:
    instructions = sandbox_seccomp.compiled(platform.machine())
    assert len(instructions) % 8 == 0 and 100 < len(instructions) // 8 < 4096  # BPF_MAXINSNS
