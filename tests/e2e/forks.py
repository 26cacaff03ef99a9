"""Runs of the command line in forked processes: each is a process of its own to kill, without three seconds of imports.

As a script it is the server: it imports everything once, then forks for every line of JSON on its standard input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 60.0
"""Seconds after which a run that should have done something has failed."""


@dataclass
class Fault:
    """What happens to the run at the ``call``-th call of ``target`` (``module:attribute``, ``module:Class.method``)."""

    target: str
    call: int = 1
    action: str = "kill"
    """kill: SIGKILL to itself before the call; kill_after: after it; stall: the call does not return."""


class Run:
    """One forked process."""

    def __init__(self, server: Forks, pid: int, log: Path) -> None:
        self.pid, self._server, self._log = pid, server, log

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Exit status as ``Popen.returncode``: negative for a signal."""
        return os.waitstatus_to_exitcode(self._server.read()["status"])

    def output(self) -> str:
        """Standard output and error so far."""
        return self._log.read_text()


class Forks:
    """The server, and the runs it forks, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )
        assert self.read() == {"ready": True}

    def start(self, arguments: Sequence[str | Path], fault: Fault | None = None) -> Run:
        """Fork ``posttrain ARGUMENTS``."""
        self._count += 1
        log = self._folder / f"output_{self._count}.txt"
        order = {"arguments": [str(a) for a in arguments], "log": str(log), "fault": vars(fault) if fault else None}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Run(self, self.read()["pid"], log)

    def run(self, arguments: Sequence[str | Path], fault: Fault | None = None) -> int:
        """``start`` and ``wait``."""
        return self.start(arguments, fault).wait()

    def read(self) -> dict[str, int]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the server of forked runs died"
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE)


def wait_until(condition, what: str) -> None:
    """Poll, because what is waited for happens in another process."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"gave up waiting for {what}"
        time.sleep(0.002)


def _apply(fault: dict[str, object]) -> None:
    module_name, _, path = str(fault["target"]).partition(":")
    *parents, leaf = path.split(".")
    owner = importlib.import_module(module_name)
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, leaf)
    seen = 0

    def faulty(*args, **kwargs):
        nonlocal seen
        seen += 1
        now = seen == fault["call"]
        if now and fault["action"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if now and fault["action"] == "kill_after":
            os.kill(os.getpid(), signal.SIGKILL)
        if now and fault["action"] == "stall":
            time.sleep(10 * PATIENCE)
        return result

    setattr(owner, leaf, faulty)


def _child(order: dict) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setsid()
    if order["fault"]:
        _apply(order["fault"])
    from posttrain.rl import cli

    sys.argv = ["posttrain", *order["arguments"]]
    status = 1
    try:
        cli.main()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _import_everything() -> None:
    """What a run would import or build on its first use: a model written and read."""
    import tempfile

    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401  # by the first optimizer step
    from transformers import AutoModelForCausalLM

    import posttrain.rl.memory
    import posttrain.rl.service.run
    import posttrain.rollout.transformers_engine
    import posttrain.trainer.trainer  # noqa: F401
    from posttrain.rl.config import ModelConfig, load
    from posttrain.rl.service.random_model import materialize

    config = load(Path(__file__).with_name("tiny.toml"))
    assert isinstance(config.model, ModelConfig)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_pretrained(materialize(config.model, Path(folder) / "model"))


def _serve() -> None:
    _import_everything()
    gc.freeze()  # or each run's garbage collection copies all of it
    out = os.fdopen(os.dup(1), "w")

    def say(message: dict) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    say({"ready": True})
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
        say({"pid": pid})
        say({"status": os.waitpid(pid, 0)[1]})


if __name__ == "__main__":
    _serve()
