"""Where rows come from: the hub, local files and folders, functions, Python iterables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from posttrain.rl.errors import DataError
from posttrain.rl.rewards import reasoning_gym
from posttrain.rl.rewards.references import import_function

Row = Mapping[str, Any]
Rows = Sequence[Row]
"""A list, or anything indexable with a length such as ``datasets.Dataset``."""

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


@dataclass(slots=True, frozen=True)
class KnownDataset:
    """What the hub does not say about a dataset."""

    subset: str | None = None
    answer_after: str | None = None


KNOWN = {
    "openai/gsm8k": KnownDataset(subset="main", answer_after="####"),
    "gsm8k": KnownDataset(subset="main", answer_after="####"),
}
"""Defaults for well-known hub datasets, where the configuration says nothing."""


def read_rows(spec: str | Iterable[Row], *, subset: str | None, split: str, base: Path | None) -> Rows:
    """Rows behind any form of ``spec``; raises ``DataError`` saying what is wrong with it."""
    if not isinstance(spec, str):
        return _from_iterable(spec)
    path = ((base or Path.cwd()) / spec).expanduser()
    if path.is_dir():
        return _from_folder(path, split)
    if path.is_file() and path.suffix in SUFFIXES:
        return _from_file(path)
    if spec.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.rows_of(spec, split)
    if ":" in spec:
        return _from_function(spec, split, base)
    if path.suffix in SUFFIXES or spec.startswith((".", "/", "~")):
        raise DataError(f"{spec}: no such file or folder (looked for {path})")
    return _from_hub(spec, subset, split)


def take_rows(rows: Rows, indices: Sequence[int]) -> Rows:
    """The rows at ``indices``; lazily where the dataset can."""
    if hasattr(rows, "select"):
        chosen: Rows = rows.select(indices)
        return chosen
    return [rows[index] for index in indices]


def _from_iterable(rows: Iterable[Row]) -> Rows:
    if isinstance(rows, Mapping):
        kind = (
            "a DatasetDict: pass one split of it" if hasattr(rows, "column_names") else "one dict: pass a list of rows"
        )
        raise DataError(f"the rows handed over are {kind}")
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        return cast("Rows", rows)
    if not isinstance(rows, Iterable):
        raise DataError(f"a dataset is a name, a path or an iterable of rows, not {type(rows).__name__}")
    return list(rows)


def _from_function(spec: str, split: str, base: Path | None) -> Rows:
    """Call it, with ``split`` where it takes one."""
    import inspect

    function = import_function(spec, base)
    keywords = {"split": split} if "split" in inspect.signature(function).parameters else {}
    try:
        rows = function(**keywords)
    except Exception as error:
        raise DataError(f"{spec} raised {type(error).__name__}: {error}") from error
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise DataError(f"{spec} returned {type(rows).__name__}; a dataset function returns an iterable of dicts")
    return _from_iterable(rows)


def _from_hub(name: str, subset: str | None, split: str) -> Rows:
    import datasets

    try:
        rows: Rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # a dozen kinds: network, missing name, split, configuration, gated, scripts
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"dataset {name}{f' ({subset})' if subset else ''}, split {split}: {first}; "
            "check data.dataset, data.subset and data.split, or give a local file"
        ) from error
    return rows


def _from_folder(folder: Path, split: str) -> Rows:
    """A folder written by ``save_to_disk``, or one of data files named after their split (``train-00000.parquet``)."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _from_disk(folder, split)
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    mine = [
        path for path in files if path.stem == split or path.stem.startswith((f"{split}-", f"{split}_", f"{split}."))
    ]
    mine = mine or [path for path in files if path.parent != folder and path.parent.name == split]
    if not mine:
        there = ", ".join(str(path.relative_to(folder)) for path in files[:8]) or f"no {', '.join(SUFFIXES)} files"
        raise DataError(f"{folder}: no file for split {split} (there: {there}); set data.split, or name one file")
    if len(mine) == 1:
        return _from_file(mine[0])
    return [row for path in mine for row in _from_file(path)]


def _from_disk(folder: Path, split: str) -> Rows:
    import datasets

    loaded: Any = datasets.load_from_disk(str(folder))
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise DataError(f"{folder}: no split {split}; there are: {', '.join(loaded)}")
        loaded = loaded[split]
    rows: Rows = loaded
    return rows


def _from_file(path: Path) -> Rows:
    """One data file, by its suffix."""
    if path.suffix == ".jsonl":
        return _from_jsonl(path)
    if path.suffix == ".json":
        return _from_json(path)
    import datasets
    import pyarrow  # type: ignore[import-untyped]  # comes with datasets
    import pyarrow.csv  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable {path.suffix[1:]} file: {str(error).splitlines()[0]}") from None
    rows: Rows = datasets.Dataset(table)
    return rows


def _from_jsonl(path: Path) -> Rows:
    rows: list[Row] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a row is an object, not {type(row).__name__}")
        rows.append(row)
    return rows


def _from_json(path: Path) -> Rows:
    """A list of objects; anything else is read as JSON lines, which many ``.json`` files are."""
    try:
        tree = json.loads(_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _from_jsonl(path)
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    rows = tree if isinstance(tree, list) else [tree]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: item {index} is {type(row).__name__}; a dataset is a list of objects")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
