"""Runs in the sandbox's process, before the program: gives up what the program shall not have, then becomes it.

``python sandbox_child.py SETTINGS`` with the ``settings`` of ``sandbox.py``. Nothing is imported but the standard
library. Order matters: each step takes away what the next ones do not need.
"""
# pathlib and json would take a third of the start-up time
# ruff: noqa: PTH123, PTH112

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# LANDLOCK_ACCESS_FS_*: the first version's thirteen, then REFER, TRUNCATE and IOCTL_DEV
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_FS_BITS_NEWEST = 16


def main() -> None:
    """Limits, capabilities, Landlock, seccomp or the audit hook; then the program."""
    settings: dict[str, Any] = marshal.loads(bytes.fromhex(sys.argv[1]))
    with open(settings["program"], "rb") as file:
        source = file.read()
    libc = ctypes.CDLL(None, use_errno=True)
    _limit(settings)
    if sys.platform == "linux":
        _die_with_parent(libc, settings["parent"])
        _drop_capabilities(libc)
        _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if settings["landlock"]:
        _landlock(libc, settings["landlock"], settings["readable"], settings["scratch"])
    if settings["seccomp"]:
        _seccomp(libc, bytes.fromhex(settings["seccomp"]))
    if settings["audit"]:
        sys.addaudithook(_audit_hook(settings["readable"], settings["scratch"]))
    _become(source, settings["program"], settings["scratch"], settings["import_paths"])


def _limit(settings: dict[str, Any]) -> None:
    """Soft and hard limits: without capabilities the program can only lower them."""
    limits = {
        "CPU": settings["cpu_s"],
        "AS": settings["memory_bytes"],
        "FSIZE": settings["file_bytes"],
        "NOFILE": settings["files"],
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    if not settings["seccomp"]:
        limits["NPROC"] = 0  # every process of the user counts, so none more; does not bind root
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            continue
        _, hard = resource.getrlimit(number)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise  # macOS knows RLIMIT_AS and refuses to lower it


def _die_with_parent(libc: ctypes.CDLL, parent: int | None) -> None:
    """Where bubblewrap stands between (no ``parent``), it sees to that itself."""
    _check(libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "pdeathsig")
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """All of them (version 3 of the call: two words each of effective, permitted, inheritable)."""
    _check(libc.capset(struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", 0, 0, 0, 0, 0, 0)), "capset")


def _landlock(libc: ctypes.CDLL, version: int, readable: list[str], scratch: str) -> None:
    """Files: read below ``readable``, read and write in ``scratch``, nothing else. TCP and outside signals: nothing.

    Source: Linux, ``Documentation/userspace-api/landlock.rst``.
    """
    every = (1 << _FS_BITS.get(version, _FS_BITS_NEWEST)) - 1
    network, scopes = 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0
    attributes = struct.pack("=QQQ", every, network, scopes)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    libc.syscall.restype = ctypes.c_long
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0)
    _check(ruleset, "landlock_create_ruleset")

    def allow(path: str, access: int) -> None:
        try:
            target = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        if not os.path.isdir(path):
            access &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        rule = struct.pack("=Qi", access & every, target)
        _check(libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule for {path}")
        os.close(target)

    for path in readable:
        allow(path, _READ_FILE | _READ_DIR)
    allow("/dev/null", _READ_FILE | _WRITE_FILE | _TRUNCATE)
    allow(scratch, _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE)
    _check(libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _seccomp(libc: ctypes.CDLL, instructions: bytes) -> None:
    array = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("@HP", len(instructions) // 8, ctypes.addressof(array))
    _check(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0), "seccomp")


def _check(result: int, step: str) -> None:
    """Nothing runs where a step failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"sandbox: {step}: {os.strerror(ctypes.get_errno())}")


def _audit_hook(readable: list[str], scratch: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Python's own events, refused: a fence for honest programs, and one that a dishonest one climbs."""
    resolve, join, fspath, kind = os.path.realpath, os.path.join, os.fsdecode, isinstance
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    roots = [resolve(path) for path in (*readable, "/dev/null")]
    inside = resolve(scratch)
    files = ("os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime", "os.listdir", "os.scandir")
    refused = (
        *(
            "os.system",
            "os.exec",
            "os.fork",
            "os.posix_spawn",
            "os.spawn",
            "os.kill",
            "os.mkdir",
            "os.chmod",
            "os.chown",
        ),
        *("os.link", "os.symlink", "os.setxattr", "os.removexattr", "os.chflags"),
        *("subprocess.", "ctypes.", "socket.connect", "socket.bind", "socket.send", "socket.get", "pty."),
        *("signal.pthread_kill", "syslog.", "fcntl."),
    )

    def below(path: Any, roots: list[str]) -> bool:
        if kind(path, int) or path is None:
            return True
        full = resolve(join(inside, fspath(path)))
        return any(full == root or full.startswith(root.rstrip("/") + "/") for root in roots)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            allowed = below(args[0], [inside, "/dev/null"] if args[2] & writing else [*roots, inside])
        elif event in files:
            allowed = all(below(path, [*roots, inside] if event in files[-2:] else [inside]) for path in args[:1])
            if event == "os.rename":
                allowed = allowed and below(args[1], [inside])
        elif event == "socket.__new__":
            allowed = args[1] == 1  # AF_UNIX, for asyncio's pair
        else:
            allowed = not event.startswith(refused)
        if not allowed:
            raise PermissionError(f"the sandbox refuses {event}")

    return hook


def _become(source: bytes, path: str, scratch: str, import_paths: list[str]) -> None:
    """The program in a fresh ``__main__``, as if Python had been started with it."""
    sys.argv = [path]
    sys.path = [scratch, *(entry for entry in sys.path if entry), *import_paths]
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=__builtins__)
    sys.modules["__main__"] = module
    exec(compile(source, path, "exec"), module.__dict__)


if __name__ == "__main__":
    main()
