"""Files that are whole whenever the process or the machine stops: atomic replacement, fsync, JSON lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.rl.errors import CheckpointError

PARTIAL = ".partial_"
"""Front of the name of what is still being written; only a killed writer leaves one behind."""


def finite(value: Any) -> Any:
    """The same value with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines; a last line without its end is left out, a broken one in between is an error."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is empty or torn
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise CheckpointError(f"{path}, line {number}: not JSON; remove the line") from None
    return rows


def cut_torn_tail(path: Path) -> None:
    """Drop what follows the last newline, so that the next line starts on its own."""
    if path.exists():
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(path, end)


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write beside, then rename over: a reader sees the old file or the new one."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    partial.write_text(text, encoding="utf-8")
    if durable:
        sync(partial)
    partial.replace(path)
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Push one file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Push every file of a folder and the folders themselves to the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))
