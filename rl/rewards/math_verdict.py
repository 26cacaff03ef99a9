"""math-verify in a process of its own, which can be stopped: parsing ``9^{9^{9^9}}`` would otherwise never end.

math-verify's own timeouts use SIGALRM, which only a main thread may; here they are off and the process is killed.
Run as a module this file is that process: a JSON pair ``[given, wanted]`` a line in, ``true`` or ``false`` a line out.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import threading

TIMEOUT_S = 5.0
START_TIMEOUT_S = 120.0
"""Importing sympy takes seconds on a busy machine."""
MAX_CHARACTERS = 1000
"""A longer final answer is not one."""


class Verdicts:
    """One child process, started at the first question and again after each that ran out of time."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def equal(self, given: str, wanted: str) -> bool:
        """Whether two expressions are equal as mathematics; ``False`` where either cannot be parsed in time."""
        if max(len(given), len(wanted)) > MAX_CHARACTERS:
            return False
        with self._lock:
            child = self._child or self._start()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps([given, wanted]).encode() + b"\n")
                child.stdin.flush()
                answer = self._line(child, self._timeout_s)
            except BrokenPipeError:
                answer = b""
            if not answer:  # out of time, or out of memory and killed
                self._stop()
            return answer == b"true\n"

    def close(self) -> None:
        """End the child process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", __name__]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._child = child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        atexit.register(self._stop)
        if self._line(child, START_TIMEOUT_S) != b"ready\n":
            self._stop()
            raise RuntimeError("math-verify did not start: try `python -c 'import math_verify'`")
        return child

    def _line(self, child: subprocess.Popen[bytes], timeout_s: float) -> bytes:
        """One line of the child's, or nothing when it is late or gone. Lines are short and written at once."""
        assert child.stdout is not None
        ready, _, _ = select.select([child.stdout], [], [], timeout_s)
        return child.stdout.readline() if ready else b""

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        atexit.unregister(self._stop)
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what was still unwritten has no reader any more
                    continue


@functools.cache
def verdicts() -> Verdicts:
    """The process that every ``math_answer`` of this one shares."""
    return Verdicts()


def verdict(given: str, wanted: str) -> bool:
    """math-verify's opinion, without a time limit."""
    from math_verify import parse, verify

    gold = parse(f"${wanted}$", parsing_timeout=None)
    found = parse(f"${given}$", parsing_timeout=None)
    return bool(gold) and bool(found) and bool(verify(gold, found, timeout_seconds=None))


def main() -> None:
    """Answer questions until standard input ends."""
    import logging

    import math_verify  # noqa: F401  # so that "ready" means ready

    logging.disable(logging.CRITICAL)  # it warns of every answer that does not parse, and of timeouts being off
    answers, sys.stdout = sys.stdout, sys.stderr
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        try:
            equal = verdict(*json.loads(line))
        except Exception:  # a model's text can break any parser: it is then not the answer
            equal = False
        answers.write("true\n" if equal else "false\n")
        answers.flush()


if __name__ == "__main__":
    main()
