"""The inside of a pool's worker: load functions, call them, answer in JSON; one call at a time, in the main thread.

What a call leaves behind (processes, timers) is cleared before its answer is sent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from posttrain.rl.rewards.process_tree import adopt_orphans, descendants, die_with_parent

MARKER = "POSTTRAIN_REWARD_WORKER"
"""Environment variable set in keepers, workers and what they start: a call there is bounded from outside."""
MAX_REPLY_BYTES = 16 << 20
_MAX_MESSAGE, _MAX_TRACE = 2_000, 8_000
"""Characters of an exception that travel back."""


def serve(connection: socket.socket, keeper: int) -> NoReturn:
    """Answer until the connection ends."""
    os.setsid()
    die_with_parent(keeper, signal.SIGKILL)
    adopt_orphans()
    _confine()
    functions: dict[int, Callable[..., Any]] = {}
    while True:
        what, number, *rest = pickle.loads(_frame(connection))
        if what == "load":
            _send(connection, _load(functions, number, *rest))
        else:
            _send(connection, _call(functions, number, *rest))


def _confine() -> None:
    """No standard streams, no core dumps, and first in line when the machine's memory runs out."""
    faulthandler.disable()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/oom_score_adj").write_text("1000")


def _load(
    functions: dict[int, Callable[..., Any]], number: int, path: list[str], pickled: bytes, module: tuple[str, str]
) -> list[object]:
    sys.path[:] = path
    try:
        try:
            functions[number] = pickle.loads(pickled)
        except ModuleNotFoundError as error:
            name, file = module
            if not file or error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise
            _make_importable(name, Path(file))
            functions[number] = pickle.loads(pickled)
    except Exception as error:
        return ["unloadable", number, *_described(error)]
    return ["loaded", number]


def _make_importable(name: str, file: Path) -> None:
    """A module that was loaded by its path there: search its folder, or execute it where its name is not the file's."""
    names = tuple(name.split("."))
    if file.with_suffix("").parts[-len(names) :] == names:
        sys.path.append(str(file.parents[len(names) - 1]))
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(file.parent))


def _call(
    functions: Mapping[int, Callable[..., Any]], number: int, function: int, memory_mib: int, arguments: bytes
) -> list[object]:
    try:
        _limit_memory(memory_mib)
        value = functions[function](**pickle.loads(arguments))
        return ["returned", number, _plain(value)]
    except MemoryError:
        return ["crashed", number, f"it ran out of memory (limit {memory_mib} MiB)"]
    except Exception as error:
        return ["raised", number, *_described(error)]
    except BaseException as error:
        return ["crashed", number, f"it raised {type(error).__name__}"]
    finally:
        _clear()


def _limit_memory(memory_mib: int) -> None:
    """Refuse what is plainly too much at once. The keeper watches the memory in use; this counts what is reserved, of
    which libraries take more than they use."""
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, ((2 * memory_mib + 1024) << 20, hard))


def _clear() -> None:
    """End timers and processes that a call left."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    while True:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return  # no child at all: the usual case
        below = descendants(os.getpid())
        for pid in below:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not below:
            return  # nobody lists them here: their group is killed with the worker
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _plain(value: Any) -> Any:
    """As JSON holds it; arrays and their scalars become lists and numbers."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"returned {type(value).__name__} {value!r:.80}: return a number")


def _described(error: Exception) -> tuple[str, str, str]:
    """Type, message and traceback, whatever the exception's own methods do."""
    try:
        message = str(error)[:_MAX_MESSAGE]
        trace = "".join(traceback.format_exception(error))[-_MAX_TRACE:]
    except Exception:
        message, trace = "(its message cannot be read)", ""
    return type(error).__name__, message, trace


def _frame(connection: socket.socket) -> bytes:
    return _exactly(connection, struct.unpack("!I", _exactly(connection, 4))[0])


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            os._exit(0)
        parts += part
    return bytes(parts)


def _send(connection: socket.socket, reply: list[object]) -> None:
    try:
        data = json.dumps(reply).encode()
    except (TypeError, ValueError, RecursionError, MemoryError) as error:
        data = json.dumps(["crashed", reply[1], f"its answer cannot be sent ({type(error).__name__})"]).encode()
    if len(data) > MAX_REPLY_BYTES:
        data = json.dumps(["crashed", reply[1], f"it returned {len(data) >> 20} MiB"]).encode()
    connection.sendall(struct.pack("!I", len(data)) + data)
