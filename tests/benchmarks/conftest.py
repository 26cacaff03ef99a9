"""The scripts import each other as neighbours, as when they are run; so do their tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def neighbours() -> Iterator[None]:
    """``import learning`` for the time of a test."""
    before = set(sys.modules)
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))
    for script in HERE.glob("*.py"):
        if script.stem in set(sys.modules) - before:
            del sys.modules[script.stem]
