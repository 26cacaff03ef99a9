"""Runs in two sandboxes at once: the tests in one, the program that they test in the other.

So the verdict is written by a process that no line of the program runs in. The two exchange plain data over pipes;
what is none (a function, a generator, an instance of a class) stays where it is and goes over as a number, behind
which the other side has a ``Remote``. The program never sees what a result is compared with.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

MESSAGE_BYTES = 1 << 24
TESTS, SOLUTION = "tests", "solution"
"""Module names that the code on either side runs under; tests may import ``solution``."""


class PeerGone(BaseException):
    """The other process ended; not an ``Exception``, which a test may expect."""


class Remote:
    """An object of the other process. It computes and compares nothing here."""

    __slots__ = ("_number", "_peer")
    _number: int
    _peer: Peer

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it there; lists, dictionaries and sets that it changes in place are changed here."""
        return self._peer.ask("call", self, list(args), kwargs, originals=args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._peer.ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._peer.ask("put", self, key, value)

    def __iter__(self) -> Iterator[Any]:
        found: Iterator[Any] = self._peer.ask("iter", self)
        return found

    def __next__(self) -> Any:
        return self._peer.ask("next", self)

    def __len__(self) -> int:
        return operator.index(self._peer.ask("len", self))

    def __bool__(self) -> bool:
        return self._peer.ask("bool", self) is True

    def __str__(self) -> str:
        return str(self._peer.ask("str", self))

    def __repr__(self) -> str:
        return str(self._peer.ask("repr", self))

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, Remote) and self._peer.ask("instance", instance, self) is True

    def __eq__(self, other: object) -> bool:
        """Two objects of the program are compared by the program; one of them equals no data."""
        if not isinstance(other, Remote):
            return False
        return self._number == other._number or self._peer.ask("equal", self, other) is True

    def __hash__(self) -> int:
        return hash(self._number)


ACTIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "put": operator.setitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "instance": isinstance,
    "equal": lambda one, other: bool(one == other),
}
COLLECTIONS: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
PLAIN: dict[type, Callable[[Any], Any]] = {int: int.__int__, float: float.__float__, str: str.__str__}
"""And what makes the plain one of an instance of a subclass."""
OFFERED = {"call", "iter", "next", "len", "item", "bool"}
"""What the program may do with objects of the tests; with instances of the tests' own classes also get and set."""


class Peer:
    """One end of the pipes. While it waits for an answer it answers what the other end asks."""

    def __init__(self, read: int, write: int, *, guarded: bool) -> None:
        self.incoming = os.fdopen(read, "rb")
        self.outgoing = os.fdopen(write, "wb")
        self.guarded = guarded
        self.objects: list[object] = []
        self.numbers: dict[int, int] = {}

    def ask(self, action: str, *values: Any, originals: tuple[Any, ...] = ()) -> Any:
        """What the other process makes of it, or its exception; arguments it changed in place are changed here."""
        self.send({"ask": action, "values": [self.pack(value) for value in values]})
        while "ask" in (message := self.receive()):
            self.answer(message)
        if "error" in message:
            raise _exception(message["error"])
        for position, packed in message.get("changed", []):
            _replace(originals[position], self.unpack(packed))
        return self.unpack(message["value"])

    def answer(self, message: dict[str, Any]) -> None:
        """Do what was asked, and reply."""
        try:
            action, packed = message["ask"], message["values"]
            values = [self.unpack(value) for value in packed]
            if self.guarded:
                _guard(action, values)
            reply: dict[str, Any] = {"value": self.pack(ACTIONS[action](*values))}
            if action == "call":
                after = enumerate(zip(values[1], packed[1][1:], strict=True))
                repacked = ((position, self.pack(value), before) for position, (value, before) in after)
                reply["changed"] = [(position, value) for position, value, before in repacked if value != before]
        except PeerGone:
            raise
        except BaseException as error:
            reply = {"error": [[kind.__name__ for kind in type(error).__mro__], _text(error)]}
        self.send(reply)

    def send(self, message: dict[str, Any]) -> None:
        """One line of JSON."""
        try:
            self.outgoing.write(json.dumps(message).encode() + b"\n")
            self.outgoing.flush()
        except OSError:
            raise PeerGone("the program ended") from None

    def receive(self) -> dict[str, Any]:
        """The next message; ``PeerGone`` where there is none."""
        line = self.incoming.readline(MESSAGE_BYTES)
        if not line.endswith(b"\n"):
            raise PeerGone("the program ended" if not line else "the program's answer is too long")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise PeerGone("the program's answer is none")
        return message

    def pack(self, value: Any) -> Any:
        """JSON for plain data, tagged where JSON has no such type; a number for everything else."""
        if value is None or isinstance(value, bool):
            return value
        for plain, convert in PLAIN.items():
            if isinstance(value, plain):
                return convert(value)
        if isinstance(value, bytes | bytearray):
            return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
        if isinstance(value, list | tuple | set | frozenset):
            name = next(name for name, collection in COLLECTIONS.items() if isinstance(value, collection))
            return [name, *(self.pack(item) for item in value)]
        if isinstance(value, dict):
            return ["dict", *([self.pack(key), self.pack(item)] for key, item in value.items())]
        if isinstance(value, Remote):
            return ["yours", value._number]
        kind = f"{type(value).__module__}.{type(value).__name__}"
        if kind in ("builtins.complex", "fractions.Fraction", "decimal.Decimal"):
            return ["number", kind, str(value)]
        if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
            return self.pack(value.item())
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return ["mine", self.numbers[id(value)]]

    def unpack(self, value: Any) -> Any:
        """The opposite of ``pack`` on the other side."""
        if not isinstance(value, list):
            return value
        tag, *rest = value
        if tag == "mine":
            return Remote(self, operator.index(rest[0]))
        if tag == "yours":
            return self.objects[rest[0]]
        if tag == "bytes" or tag == "bytearray":
            return getattr(builtins, tag).fromhex(rest[0])
        if tag == "dict":
            return {self.unpack(key): self.unpack(item) for key, item in rest}
        if tag == "number":
            return _number(*rest)
        return COLLECTIONS[tag](self.unpack(item) for item in rest)


def run_program(job: dict[str, Any]) -> None:
    """The program's side: run it, say what it defines, and answer until the tests are done."""
    peer = Peer(job["read"], job["write"], guarded=False)
    _silence()
    module = types.ModuleType(SOLUTION)
    sys.modules[SOLUTION] = module
    try:
        exec(compile(job["source"], "<program>", "exec"), module.__dict__)
        names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
        defined = {name: peer.pack(value) for name, value in names.items() if not isinstance(value, types.ModuleType)}
        modules = [(name, value.__name__) for name, value in names.items() if isinstance(value, types.ModuleType)]
    except BaseException as error:
        peer.send({"failed": f"{type(error).__name__}: {_text(error)}"})
        return
    peer.send({"defined": defined, "modules": modules})
    while True:
        peer.answer(peer.receive())


def run_tests(job: dict[str, Any]) -> None:
    """The tests' side: every step in one namespace; a line of JSON for each test: its number, and what went wrong."""
    peer = Peer(job["read"], job["write"], guarded=True)
    verdicts = os.fdopen(os.dup(1), "w")
    _silence()

    def report(*verdict: object) -> None:
        verdicts.write(json.dumps(verdict) + "\n")
        verdicts.flush()

    try:
        hello = peer.receive()
        if "failed" in hello:
            return report("program", hello["failed"])
        module = _solution(peer, hello)
    except (PeerGone, Exception) as error:
        return report("program", _text(error))
    namespace: dict[str, Any] = {**vars(module), "__name__": TESTS}
    if job["entry_point"] is not None:
        namespace["candidate"] = namespace.get(job["entry_point"])
    for position, (source, counted) in enumerate(job["steps"]):
        try:
            exec(compile(source, "<tests>", "exec"), namespace)
        except BaseException as error:
            report(position, f"{type(error).__name__}: {_text(error)}")
            if not counted or isinstance(error, PeerGone):
                return
        else:
            report(position, None)


def _solution(peer: Peer, hello: dict[str, Any]) -> types.ModuleType:
    """What the program defined, as a module here. It cannot put a name of its own before one of Python's."""
    module = types.ModuleType(SOLUTION)
    for name, packed in hello["defined"].items():
        if not hasattr(builtins, name) and not name.startswith("__"):
            setattr(module, name, peer.unpack(packed))
    for name, imported in hello["modules"]:
        if imported.partition(".")[0] in sys.stdlib_module_names:
            setattr(module, name, __import__(imported, fromlist=["*"]))
    sys.modules[SOLUTION] = module
    return module


def _guard(action: str, values: list[Any]) -> None:
    """Refuse the program what would lead it from an object of the tests to the tests themselves."""
    target, name = values[0], values[1] if len(values) > 1 else None
    public = type(target).__module__ == TESTS and isinstance(name, str) and not name.startswith("_")
    if not (action in OFFERED or (action in ("get", "set") and public)):
        raise PermissionError(f"the program may not {action} an object of the tests")


def _silence() -> None:
    """What the code prints goes nowhere, and it reads nothing."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)


def _exception(error: Any) -> Exception:
    """The nearest of Python's own exceptions to what the other process raised."""
    names, text = error
    for name in names:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(text)
            except TypeError:  # UnicodeDecodeError and its like take five arguments
                continue
    return RuntimeError(f"{names[0]}: {text}")


def _replace(original: Any, changed: Any) -> None:
    if isinstance(original, list | bytearray):
        original[:] = changed
    elif isinstance(original, dict | set):
        original.clear()
        original.update(changed)


def _number(name: str, text: str) -> Any:
    if name == "fractions.Fraction":
        from fractions import Fraction

        return Fraction(text)
    if name == "decimal.Decimal":
        from decimal import Decimal

        return Decimal(text)
    return complex(text)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except Exception:
        return "(no message)"


def main() -> None:
    """``role`` says which side this is."""
    job = json.load(sys.stdin)
    try:
        (run_tests if job["role"] == "tests" else run_program)(job)
    except PeerGone:
        sys.exit(1)


if __name__ == "__main__":
    main()
