"""Kernels stand at the bottom: they import nothing of ours but each other (import-linter does not see this folder)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def imported_modules(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "" if node.level == 0 else "posttrain.relative")
    return found


def test_the_scan_sees_every_form_of_import():
    source = "import posttrain.rl\nfrom posttrain import rl\ndef f():\n    from ..rl import types\n"
    assert imported_modules(source) == {"posttrain.rl", "posttrain", "posttrain.relative"}


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_nothing_of_ours(path: Path):
    ours = {name for name in imported_modules(path.read_text()) if name.split(".")[0] == "posttrain"}
    assert all(name.startswith("posttrain.kernels") for name in ours), ours


def test_the_folder_has_no_init_file():
    assert not (KERNELS / "__init__.py").exists()
