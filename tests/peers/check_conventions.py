"""The calling conventions, held against the libraries they come from: ``python -m tests.peers.check_conventions``.

Installs the newest TRL, verifiers (and the last 0.1), verl, OpenRLHF and AReaL, without what they depend on, into a
folder of its own (``--folder`` keeps it) and reads their source, which is never run:

* names: the code that calls a reward function passes the names that our convention knows;
* bundled: each reward function that a library brings follows the style we choose for it;
* table: our own functions in ``tests/rl/rewards/conventions`` could be called by the library's code.

Unsloth calls reward functions with TRL's trainer, so its notebooks are held against TRL. Ends with status 1 where
something differs, for example after a release that passes a new name.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import linecache
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards import conventions
from posttrain.rl.rewards.conventions import Convention
from posttrain.rl.rewards.signature import function_name, read
from tests.rl.rewards.conventions.case import Case
from tests.rl.rewards.conventions.table import LIBRARIES

Def = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Peer:
    """One generation of a library: where it calls reward functions, and which it brings."""

    requirement: str
    file: str
    calls: Callable[[ast.Module], set[str]]
    """Names that the calling code in ``file`` passes."""
    convention: Convention
    table: tuple[str, ...] = ()
    """Libraries in the table of functions whose functions this code would call."""
    left_out: frozenset[str] = frozenset()
    """Names passed there that we do not offer."""
    ours_too: frozenset[str] = frozenset()
    """Names that we offer beyond those passed there."""
    passes_everything: bool = True
    """Whether a function must accept every name; else only those it has are passed."""
    bundled: Mapping[str, str] = field(default_factory=dict)
    """Files with reward functions, and parameters that tell those from other functions: ``a b`` either, ``a+b`` both,
    or ``@name`` their decorator."""


def keywords(function: str, callee: str) -> Callable[[ast.Module], set[str]]:
    """Names of the keyword arguments of calls to ``callee`` inside ``function``."""

    def names(tree: ast.Module) -> set[str]:
        calls = [node for node in _walk(tree, function) if isinstance(node, ast.Call)]
        found = [call for call in calls if ast.unparse(call.func) == callee]
        return {keyword.arg for call in found for keyword in call.keywords if keyword.arg}

    return names


def keys(function: str, variable: str) -> Callable[[ast.Module], set[str]]:
    """Keys of the dict ``variable`` inside ``function``: of a literal, ``dict(…)``, ``update`` or by subscript."""

    def names(tree: ast.Module) -> set[str]:
        found: set[str] = set()
        for node in _walk(tree, function):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable:
                found |= _literal_keys(node.value)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == f"{variable}.update" and node.args:
                found |= _literal_keys(node.args[0])
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == variable:
                found |= {str(node.slice.value)} if isinstance(node.slice, ast.Constant) else set()
        return found

    return names


def both(*sources: Callable[[ast.Module], set[str]]) -> Callable[[ast.Module], set[str]]:
    """The names that several find."""
    return lambda tree: set(itertools.chain.from_iterable(source(tree) for source in sources))


def lists_handed_on(function: str, callee: str) -> Callable[[ast.Module], set[str]]:
    """Of ``to_thread(callee, a_list[i:j], b_list[i:j])`` inside ``function``: a and b."""

    def names(tree: ast.Module) -> set[str]:
        for node in _walk(tree, function):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.args[0]) == callee:
                return {ast.unparse(one).partition("[")[0].removesuffix("_list") for one in node.args[1:]}
        return set()

    return names


def _literal_keys(value: ast.expr) -> set[str]:
    if isinstance(value, ast.Dict):
        return {str(key.value) for key in value.keys if isinstance(key, ast.Constant)}
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "dict":
        return {keyword.arg for keyword in value.keywords if keyword.arg}
    return set()


def _walk(tree: ast.Module, function: str) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, Def) and node.name == function:
            yield from ast.walk(node)


PEERS = (
    Peer(
        "trl",
        "trl/trainer/grpo_trainer.py",
        both(keywords("_calculate_rewards", "reward_func"), keys("_calculate_rewards", "reward_kwargs")),
        conventions.TRL,
        table=("trl", "unsloth"),
        left_out=frozenset({"log_extra", "log_metric", "environments"}),
        bundled={"trl/rewards/*.py": "completions completion_ids"},
    ),
    Peer(
        "verifiers<0.2",
        "verifiers/rubrics/rubric.py",
        keys("score_objects", "objects"),
        conventions.VERIFIERS,
        table=("verifiers 0.1",),
        passes_everything=False,
        bundled={"verifiers/rubrics/*.py": "completion"},
    ),
    Peer(
        "verifiers<0.2",
        "verifiers/rubrics/rubric.py",
        keys("group_score_objects", "objects"),
        conventions.VERIFIERS_GROUP,
        table=("verifiers 0.1",),
        passes_everything=False,
    ),
    Peer(
        "verifiers",
        "verifiers/v1/task.py",
        keys("score", "available"),
        conventions.VERIFIERS_TASK,
        table=("verifiers 0.4",),
        left_out=frozenset({"runtime"}),
        ours_too=frozenset({"state", "self"}),  # state: before 0.2
        passes_everything=False,
        bundled={"verifiers/v1/tasksets/*/taskset.py": "@reward"},
    ),
    Peer(
        "verl",
        "verl/experimental/reward_loop/reward_manager/naive.py",
        keywords("run_single", "self.compute_score"),
        conventions.VERL,
        table=("verl",),
        bundled={"verl/utils/reward_score/*.py": "solution_str+ground_truth"},
    ),
    Peer(
        "verl",
        "verl/workers/reward_manager/batch.py",
        keywords("verify", "self.compute_score"),
        conventions.VERL_BATCH,
        table=("verl",),
        bundled={"verl/utils/reward_score/*.py": "solution_strs"},
    ),
    Peer(
        "openrlhf",
        "openrlhf/utils/agent.py",
        lists_handed_on("_fetch_rewards_via_func", "self.reward_func"),
        conventions.OPENRLHF,
        table=("openrlhf",),
    ),
    Peer(
        "areal",
        "areal/workflow/vision_rlvr.py",
        keywords("_compute_rewards", "self.async_reward_fn"),
        conventions.AREAL,
        table=("areal",),
        bundled={"areal/reward/*.py": "completions", "areal/api/reward_api.py": "completions",
                 "areal/workflow/*/math_agent.py": "completions"},
    ),
)  # fmt: skip


def installed(requirement: str, folder: Path) -> tuple[Path, str]:
    """The folder a package lies in, without what it depends on, and its version."""
    target = folder / "".join(letter if letter.isalnum() else "_" for letter in requirement)
    if not target.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-compile",
            "--ignore-requires-python",
        ]
        subprocess.run([*command, "--target", str(target), requirement], check=True)
    name = requirement.partition("<")[0]
    [info] = target.glob(f"{name}-*.dist-info")
    return target, info.name.removesuffix(".dist-info").partition("-")[2]


def check_names(peer: Peer, root: Path) -> list[str]:
    """What the calling code passes, against what the convention offers."""
    passed = peer.calls(ast.parse((root / peer.file).read_text()))
    if not passed:
        return [f"{peer.file}: the code that calls reward functions was not found; has it moved?"]
    offered = {*peer.convention.makers, *peer.convention.columns}
    offered |= passed & {"answer"}  # a column like any other, which verifiers names
    wrong = [
        f"passes {name}, which {peer.convention.style} does not offer" for name in passed - offered - peer.left_out
    ]
    wrong += [
        f"does not pass {name}, which {peer.convention.style} offers" for name in offered - passed - peer.ours_too
    ]
    return wrong


def check_table(peer: Peer, root: Path) -> tuple[int, list[str]]:
    """How many functions of the table the calling code could call, and those it could not."""
    passed = peer.calls(ast.parse((root / peer.file).read_text()))
    shapes = {tuple(inspect.signature(function).parameters) for _, function in bundled(peer, root)}
    cases = {function_name(case.function): case for library in peer.table for case in LIBRARIES[library]}
    fitting = [case for case in cases.values() if read(case.function).convention is peer.convention]
    wrong = [message for case in fitting if (message := _uncallable(case, peer, passed, shapes))]
    return len(fitting), wrong


def _uncallable(case: Case, peer: Peer, passed: set[str], shapes: set[tuple[str, ...]]) -> str | None:
    signature = read(case.function)
    known = passed | set(case.columns) | {"self"}
    if unknown := set(signature.required) - known:
        return f"{signature.name} asks for {', '.join(unknown)}, which is not passed"
    refused = passed - set(signature.names) if peer.passes_everything and not signature.takes_all else set()
    if refused and not any(set(shape) == set(signature.names) for shape in shapes):
        return f"{signature.name} does not take {', '.join(refused)}, and no bundled function has its parameters"
    return None


def check_bundled(peer: Peer, root: Path) -> tuple[int, list[str]]:
    """How many reward functions the library brings, and those that we would call in another style."""
    wrong, count = [], 0
    for where, function in bundled(peer, root):
        count += 1
        try:
            style: str = read(function).style
        except RewardError as error:
            style = str(error)
        if style != peer.convention.style:
            wrong.append(f"{where} {function.__name__}{inspect.signature(function)}: {style}")
    return count, wrong


def bundled(peer: Peer, root: Path) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Reward functions of the library, made again from their source."""
    for pattern, mark in peer.bundled.items():
        for path in sorted(root.glob(pattern)):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, Def) and _is_marked(node, mark):
                    yield str(path.relative_to(root)), _made_again(node, str(path))


def _is_marked(node: Def, mark: str) -> bool:
    if mark.startswith("@"):
        return any(ast.unparse(decorator).partition("(")[0].endswith(mark[1:]) for decorator in node.decorator_list)
    names = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    return any(set(together.split("+")) <= names for together in mark.split())


def _made_again(node: Def, path: str) -> Callable[..., Any]:
    """A function of the same signature and source, of which only the signature can be used."""
    node.decorator_list = []
    node.args.defaults = [ast.Constant(None) for _ in node.args.defaults]
    node.args.kw_defaults = [default and ast.Constant(None) for default in node.args.kw_defaults]
    if node.name == "__call__":
        node.args.args = node.args.args[1:]
    source = "from __future__ import annotations\n" + ast.unparse(ast.fix_missing_locations(node)) + "\n"
    name = f"{path}:{node.name}:{node.lineno}"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {}
    exec(compile(source, name, "exec"), space)  # defines it; nothing in it runs
    function: Callable[..., Any] = space[node.name]
    return function


def main() -> int:
    """Print a line for each generation of a library and each difference; 1 where there is any."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where the packages are installed, and kept")
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="peers-"))
    differences = 0
    for peer in PEERS:
        root, version = installed(peer.requirement, folder)
        names = check_names(peer, root)
        brought, odd = check_bundled(peer, root)
        functions, uncallable = check_table(peer, root)
        wrong = names + odd + uncallable
        differences += len(wrong)
        passed = ", ".join(sorted(peer.calls(ast.parse((root / peer.file).read_text()))))
        sys.stdout.write(
            f"{peer.requirement.partition('<')[0]} {version} ({peer.file}): passes {passed}; {brought} bundled and "
            f"{functions} of our functions read; {len(wrong) or 'no'} differences\n"
        )
        sys.stdout.writelines(f"    {line}\n" for line in wrong)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
