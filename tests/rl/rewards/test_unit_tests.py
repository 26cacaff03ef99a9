"""Programs before their tests: right ones, wrong ones, and those that would rather write the verdict."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from posttrain.rl.errors import ConfigError, RewardError
from posttrain.rl.rewards import resolve, sandbox
from posttrain.rl.rewards.decorator import explanation_of
from posttrain.rl.rewards.unit_tests import extract_program, same_output, unit_tests
from posttrain.rl.rewards.unit_tests_column import Case, Step, read_tests


def score(completion: str, tests: object, entry_point: str | None = None, **settings: Any) -> float:
    return asyncio.run(_score(completion, tests, entry_point, settings))


async def _score(completion: str, tests: object, entry_point: str | None, settings: dict[str, Any]) -> float:
    return await unit_tests(**settings)(completion, tests, entry_point)


def share(program: str, tests: object, entry_point: str | None = None) -> float:
    return score(program, tests, entry_point, all_or_nothing=False)


DOUBLES = [{"input": "2\n", "output": "4\n"}, {"input": "3", "output": "6"}, {"input": "-1", "output": "-2"}]


@pytest.mark.parametrize(
    ("program", "part"),
    [
        ("print(2 * int(input()))", 1.0),
        ("n = int(input())\nprint(n + 2 if n == 2 else 6)", 2 / 3),
        ("print(4)", 1 / 3),
        ("print(2 * int(input()), end=' \\n\\n')", 1.0),
        ("print(2 * int(input()))\nraise SystemExit(1)", 0.0),
        ("print(2 * int(input()), flush=True)\nimport os\nos._exit(0)", 1.0),
        ("", 0.0),
    ],
)
def test_share_and_all_or_nothing_of_inputs_and_outputs(program: str, part: float) -> None:
    assert share(program, DOUBLES) == pytest.approx(part)
    assert score(program, DOUBLES) == float(part == 1)


@pytest.mark.parametrize(
    "column",
    [
        DOUBLES,
        json.dumps(DOUBLES),
        {"inputs": ["2", "3", "-1"], "outputs": ["4", "6", "-2"]},
        json.dumps({"inputs": ["2", "3", ["-1"]], "outputs": ["4", 6, ["-2"]]}),
    ],
)
def test_every_form_of_inputs_and_outputs_is_the_same_tests(column: object) -> None:
    cases = [(case.input.strip(), case.output.strip()) for case in read_tests(column) if isinstance(case, Case)]
    assert cases == [("2", "4"), ("3", "6"), ("-1", "-2")]


HUMANEVAL = """METADATA = {'author': 'x'}

def check(candidate):
    assert candidate([1.0, 2.0]) == 3.0
    for n in range(5):
        assert abs(candidate([0.1] * n) - 0.1 * n) < 1e-6
"""
PYTEST = """from solution import total

def test_empty():
    assert total([]) == 0

def test_two():
    assert total([1, 2]) == 3
"""


@pytest.mark.parametrize(
    ("tests", "entry_point", "right", "off_by_one"),
    [
        (["assert total([1, 2]) == 3", "assert total([]) == 0", "assert total([0]) > 0.5"], None, 2 / 3, 1 / 3),
        ("x = [1, 2]\nassert total(x) == 3\nassert total(x) == 4; assert x == [1, 2]", None, 2 / 3, 2 / 3),
        (HUMANEVAL, "total", 1.0, 0.0),
        (HUMANEVAL + "\ncheck(total)", None, 1.0, 0.0),
        (PYTEST, None, 1.0, 0.0),
        ("import math\nassert math.isclose(total([.1] * 3), .3)", None, 1.0, 0.0),
    ],
)
def test_every_form_of_asserts(tests: object, entry_point: str | None, right: float, off_by_one: float) -> None:
    assert share("def total(x):\n    return sum(x)", tests, entry_point) == pytest.approx(right)
    assert share("def total(x):\n    return sum(x) + 1", tests, entry_point) == pytest.approx(off_by_one)


RIGHT = {
    "plain data of every kind": (
        "def f():\n    return {(1, 2): {3}, 'a': [None, True, 1e400, b'x', 2 + 1j, frozenset({'ü'}), 10**30, -0.5]}",
        "assert f() == {(1, 2): {3}, 'a': [None, True, float('inf'), b'x', 2+1j, frozenset({'ü'}), 10**30, -0.5]}",
    ),
    "kinds stay apart": ("def f():\n    return (1, [2])", "assert f() != [1, [2]] and f() == (1, [2])"),
    "fractions": (
        "from fractions import Fraction\ndef f():\n    return Fraction(1, 3)",
        "from fractions import Fraction\nassert f() == Fraction(2, 6)",
    ),
    "a subclass of a plain type": (
        "from collections import Counter\nfrom enum import IntEnum\nclass E(IntEnum):\n    A = 3\n"
        "def f():\n    return Counter('aab'), E.A",
        "assert f() == ({'a': 2, 'b': 1}, 3)",
    ),
    "an argument changed in place": (
        "def f(x, d):\n    x.sort()\n    d['n'] = len(x)",
        "a, d = [3, 1, 2], {}\nassert f(a, d) is None\nassert (a, d) == ([1, 2, 3], {'n': 3})",
    ),
    "a generator": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2] and sum(f(4)) == 6"),
    "a function of the tests": ("def f(g, x):\n    return g(g(x))", "assert f(lambda x: x + 1, 2) == 4"),
    "a generator of the tests": ("def f(x):\n    return sum(x)", "assert f(i * i for i in range(4)) == 14"),
    "an exception": (
        "class Odd(ValueError): pass\ndef f(x):\n    raise Odd('no')",
        "try:\n    f(1)\nexcept ValueError as e:\n    seen = str(e)\nassert seen == 'no'",
    ),
    "a class of the program": (
        "class P:\n    def __init__(self, v): self.v = v\n    def plus(self, o): return P(self.v + o.v)\n"
        "    def __eq__(self, o): return self.v == o.v\n    def __len__(self): return self.v\n"
        "    def __getitem__(self, i): return i * self.v",
        "p = P(1).plus(P(2))\nassert p.v == 3 and p == P(3) and p != P(4) and len(p) == 3 and p[2] == 6\n"
        "p.v = 9\nassert p.v == 9 and isinstance(p, P) and not isinstance(3, P)",
    ),
    "a class of the tests": (
        "def f(n):\n    n.v += 1\n    return n.next.v + n.twice()",
        "class N:\n    def __init__(self, v, next=None): self.v, self.next = v, next\n"
        "    def twice(self): return 2 * self.v\nn = N(1, N(5))\nassert f(n) == 9 and n.v == 2",
    ),
    "a module that the program imported": ("import math\ndef f(): return math.pi", "assert math.floor(f()) == 3"),
    "a program that would read and print": (
        "def f(x): return x\nif __name__ == '__main__':\n    print(f(input()))",
        "assert f(1) == 1",
    ),
    "prints": ("print('x' * 99999)\ndef f(x):\n    print('[0, null]')\n    return x", "assert f(1) == 1"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_results_are_compared_as_if_tests_and_program_were_one(name: str) -> None:
    program, tests = RIGHT[name]
    assert share(program, tests) == 1, explanation_of(unit_tests())(program, tests)  # type: ignore[misc]


AGREES = "class Yes:\n    __eq__ = __ne__ = __lt__ = __gt__ = __sub__ = __rsub__ = __contains__ = lambda *a: True\n"
FORGED = {
    "equals everything": (AGREES + "f = lambda *a: Yes()", "assert f(2) == 4"),
    "equals everything from the right": (AGREES + "f = lambda *a: Yes()", "assert 4 == f(2)"),
    "differs from everything": (AGREES + "f = lambda *a: Yes()", "assert f(2) != 4 and f(2) == 5"),
    "is near everything": (AGREES + "f = lambda *a: Yes()", "assert abs(f(2) - 4) < 1e-6"),
    "is below everything": (AGREES + "f = lambda *a: Yes()", "assert f(2) < 3"),
    "a list that equals everything": (
        "class L(list):\n    __eq__ = lambda *a: True\nf = lambda *a: L([7])",
        "assert f(2) == [1]",
    ),
    "ends the process": ("import os\nos._exit(0)", "assert f(2) == 4"),
    "ends the process when called": ("import os\ndef f(x): os._exit(0)", "assert f(2) == 4"),
    "leaves": ("def f(x): raise SystemExit(0)", "assert f(2) == 4"),
    "replaces Python's functions": (
        "import builtins\nabs = len = sorted = set = all = lambda *a: 0\nbuiltins.abs = abs\nf = lambda *a: [3]",
        "assert set(f(2)) == set([4]) and all([f(2) == 4]) and sorted(f(1)) == sorted([4])",
    ),
    "replaces Python's names": ("globals()['__builtins__'] = {}\nf = lambda *a: 3", "assert f(2) == 4"),
    "replaces a module": (
        "import sys, types\nmath = types.ModuleType('math')\nmath.isclose = lambda *a: True\n"
        "sys.modules['math'] = math\nf = lambda *a: 3",
        "assert math.isclose(f(2), 4)",
    ),
    "prints a verdict": (
        "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'[0, null]\\n')\n    except OSError: pass\n"
        "f = lambda *a: 3",
        "assert f(2) == 4",
    ),
    "answers before it is asked": (
        "import os\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, b'{\"defined\": {\"f\": 4, \"check\": [\"mine\", 0]}, "
        "\"modules\": []}\\n{\"value\": true}\\n{\"value\": true}\\n')\n    except OSError: pass\n",
        "assert f(2) == 4",
    ),
    "goes through an argument to the tests": (
        "def f(g):\n    g.__globals__['EXPECTED'] = 3\n    return 3",
        "EXPECTED = 4\nassert f(lambda x: x) == EXPECTED",
    ),
    "goes through a generator to the tests": (
        "def f(g):\n    g.gi_frame.f_globals['EXPECTED'] = 3\n    return 3",
        "EXPECTED = 4\nassert f(i for i in [1]) == EXPECTED",
    ),
    "goes through an instance to the tests": (
        "def f(n):\n    n.__class__.__eq__ = lambda *a: True\n    return n.__init__.__globals__",
        "class N:\n    def __init__(self): self.v = 1\nassert f(N()) == 4",
    ),
    "sends garbage": ("import os\ndef f(x):\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, b'{\"value\": [\"mine\"]}\\n')\n        except OSError: pass\n    return 3",
        "assert f(2) == 4",
    ),
    "goes deep": ("def f(x):\n    a = []\n    for i in range(10**5): a = [a]\n    return a", "assert f(2) == 4"),
    "returns itself": ("def f(x):\n    a = []\n    a.append(a)\n    return a", "assert f(2) == 4"),
    "is not Python": ("def f(:", "assert True"),
    "fails at once": ("1 / 0", "assert True"),
    "is half a character": ("f = '\ud800'", "assert True"),
    "has a NUL": ("f = 1\0", "assert True"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_no_program_writes_its_own_verdict(name: str) -> None:
    program, tests = FORGED[name]
    assert share(program, tests) == 0


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("while True: pass", DOUBLES),
        ("while True: pass", "assert f(2) == 4"),
        ("def f(x):\n    while True: pass", "assert f(2) == 4"),
        ("def f(x):\n    return bytearray(10 << 30)", "assert f(2) == 4"),
        ("def f(x):\n    while True: yield 1", "assert list(f(2)) == 4"),
        ("def f(x):\n    while True: print('x' * 10**6)", "assert f(2) == 4"),
    ],
)
def test_a_program_that_does_not_end_scores_0_in_its_time(program: str, tests: object) -> None:
    began = time.monotonic()
    assert score(program, tests, timeout_s=1.0) == 0
    assert time.monotonic() - began < 10


def test_all_inputs_of_a_sample_together_take_six_times_the_limit_at_most() -> None:
    began = time.monotonic()
    assert score("while True: pass", DOUBLES * 20, timeout_s=0.2, all_or_nothing=False) == 0
    assert time.monotonic() - began < 10  # 60 inputs would take 12 s


def test_tests_passed_before_the_time_is_up_count() -> None:
    program = "def f(x):\n    while x == 3: pass\n    return x"
    tests = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3", "assert f(4) == 4"]
    assert score(program, tests, timeout_s=1.0, all_or_nothing=False) == 0.5


def test_many_samples_at_once_keep_their_scores_apart() -> None:
    async def together() -> list[float]:
        reward = unit_tests()
        return await asyncio.gather(*(reward(f"print({n} * int(input()))", DOUBLES) for n in (1, 2, 3, 2, 4)))

    assert asyncio.run(together()) == [0, 1, 0, 1, 0]
    assert sandbox.threads()._max_workers == sandbox.cores()


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1", "x = 1"),
        ("First\n```python\na = 1\n```\nthen\n```python\nb = 2\n```\nand\n```\noutput\n```", "b = 2"),
        ("```\na = 1\n```\n```\nb = 2\n```", "b = 2"),
        ("```py\na = 1", "a = 1"),
        ("```python3\ns = '''\n``\n'''\n```", "s = '''\n``\n'''"),
        ("````python\ns = '```'\n```\n````", "s = '```'\n```"),
        ("~~~Python\na = 1\n~~~", "a = 1"),
        ("1. so\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("```cpp\nint x;\n```", "```cpp\nint x;\n```"),
        ("```cpp\nint x;\n```\n```python\na\n```\n```json\n{}\n```", "a"),
        ("```python\n```", ""),
        ("", ""),
    ],
)
def test_the_program_in_a_completion(completion: str, program: str) -> None:
    assert extract_program(completion) == program


@pytest.mark.parametrize(
    ("given", "wanted", "tolerance", "same"),
    [
        ("1 2\n3\n", "1  2 \n3", 0, True),
        ("1 2 3", "1 2\n3", 0, False),
        ("\n1", "1", 0, False),
        ("1\n\n2", "1\n2", 0, False),
        ("1.0", "1", 0, False),
        ("1.0", "1", 1e-9, True),
        ("0.3000001 yes", "0.3 yes", 1e-6, True),
        ("0.30001", "0.3", 1e-6, False),
        ("1000001", "1000000", 1e-6, True),
        ("nan", "nan", 0, True),
        ("yes", "Yes", 1e-6, False),
        ("", "", 0, True),
        ("", "0", 1e-6, False),
    ],
)
def test_outputs_are_compared_line_by_line(given: str, wanted: str, tolerance: float, same: bool) -> None:
    assert same_output(given, wanted, tolerance) is same


@pytest.mark.parametrize(
    ("tests", "complaint"),
    [
        ([], "is empty"),
        (None, "is NoneType"),
        (7, "is int"),
        ("", "no assert"),
        ("x = 1", "no assert"),
        ("assert (", "is not Python"),
        (["assert 1", "assert ("], "is not Python"),
        ("[1, 2", "begins like JSON"),
        ([1, 2], "mixes int"),
        (["assert 1", {"input": "", "output": ""}], "mixes dict, str"),
        ([{"input": "1"}], "has keys input"),
        ([{"input": "1", "output": None}], "NoneType"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [], "outputs": []}, "0 inputs"),
        ({"inputs": "12", "outputs": "34"}, "has keys"),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [2]}, "calls a function by name"),
        ("def check(candidate):\n    assert candidate(1)", "add the column entry_point"),
    ],
)
def test_a_malformed_column_is_the_users_error(tests: object, complaint: str) -> None:
    with pytest.raises(RewardError, match="unit_tests: column tests") as raised:
        score("x = 1", tests)
    assert complaint in str(raised.value) and "\n" not in str(raised.value)


def test_only_tests_count_and_setup_runs_before_them() -> None:
    source = "import random\nrandom.seed(0)\nx = f(2)\nassert x == 4\ntest_more(x)"
    assert read_tests(source) == [
        Step("import random", counted=False),
        Step("random.seed(0)", counted=False),
        Step("x = f(2)", counted=False),
        Step("assert x == 4", counted=True),
        Step("test_more(x)", counted=True),
    ]
    assert share("def f(x): raise OSError", "assert True\nx = f(2)\nassert True\nassert True") == pytest.approx(1 / 3)


def test_what_went_wrong_is_said() -> None:
    explain = explanation_of(unit_tests())
    assert explain is not None
    program = "print(int(input()) + 2)"
    assert explain(program, DOUBLES) == (
        "1 of 3 tests passed: test 2: printed '5\\n' instead of '6'; the rest was not run"
    )
    assert explain("print(2 * int(input()))", DOUBLES) == "3 of 3 tests passed"
    assert explain("1 / 0", DOUBLES[:1]) == "0 of 1 tests passed: test 1: ZeroDivisionError: division by zero"
    assert explain("1 / 0", "assert True") == "0 of 1 tests passed: ZeroDivisionError: division by zero"
    wrong = explain("def f(x): return 1", ["assert f(1) == 1", "assert f(2) == 2"])
    assert wrong == "1 of 2 tests passed: test 2 (assert f(2) == 2): AssertionError"


def test_settings_come_from_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = resolve("unit_tests", settings={"all_or_nothing": False, "timeout_s": 5, "tolerance": 0.1})
    assert asyncio.run(reward("print(1.05)", [{"input": "", "output": "1"}, {"input": "", "output": "2"}])) == 0.5
    for wrong in ({"timeout_s": 0}, {"memory_mib": float("inf")}, {"tolerance": -1}, {"timeout": 5}):
        with pytest.raises(ConfigError, match="reward unit_tests: settings"):
            resolve("unit_tests", settings=wrong)
    monkeypatch.setattr(sandbox, "available", lambda: sandbox.Isolation("limited"))
    with pytest.raises(RewardError, match="install bubblewrap"):
        unit_tests(require_isolation=True)
