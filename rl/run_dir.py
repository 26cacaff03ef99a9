"""The folder of one run: the only file that knows its paths, and what makes them survive ``kill -9``.

config.toml                 the whole configuration
metrics.jsonl               one object a line: ``step`` and ``group/name`` keys
rollouts/step_000120.jsonl  the samples of one step; ``eval_000120.jsonl`` those of an evaluation
checkpoints/step_000120/    state.json beside whatever the trainer saves
logs/                       timeline.jsonl, messages.log, TensorBoard, W&B
reward.png                  the curve
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w

from posttrain import __version__
from posttrain.rl.durable import PARTIAL, cut_torn_tail, finite, read_rows, sync, sync_tree, write_atomically
from posttrain.rl.errors import CheckpointError, ConfigError
from posttrain.rl.timeline import Span

STATE = "state.json"
"""A checkpoint is complete when this file is in it and parses; the caller of ``checkpoint`` writes it."""

_STEP = re.compile(r"^step_(\d{6,})$")
_ROWS = re.compile(r"^(?:step|eval)_(\d{6,})\.jsonl$")
_REPLACED = ".replaced_"


class RunDir:
    """One run on disk. ``create`` makes a new one, ``open`` finds an old one."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock_fd: int | None = None
        self._whole: set[Path] = set()

    @classmethod
    def create(
        cls, output_dir: Path | str, name: str | None, config_tree: Mapping[str, Any], *, base: Path | None = None
    ) -> RunDir:
        """A new folder ``output_dir/name`` (by default the date and time) holding ``config.toml``.

        ``base``: the folder that relative paths in the configuration start from, by default the working directory.
        """
        if name is not None and (not name or name in {".", ".."} or "/" in name or os.sep in name):
            raise ConfigError(f"run_name {name!r} must be a plain folder name; folders above it go into output_dir")
        path = Path(output_dir) / name if name else _dated(Path(output_dir))
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise ConfigError(
                f"{path} is not empty: choose another run_name, delete it, or run: posttrain train --resume {path}"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be created ({error.strerror}); choose another output_dir") from None
        run = cls(path)
        origin = {"posttrain": __version__, "base": str((base or Path.cwd()).resolve())}
        write_atomically(run.origin_file, json.dumps(origin) + "\n")
        run.write_config(config_tree)
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunDir:
        """An existing run; what a killed process left half-written is cleared away, unless one is at work there."""
        run = cls(path)
        if not run.path.is_dir():
            raise CheckpointError(f"{path}: there is no such run; give the folder that holds config.toml")
        if not run.config_file.is_file():
            raise CheckpointError(f"{path}: not a run, it has no config.toml; give the folder that holds one")
        with suppress(CheckpointError, OSError), run.lock():  # someone trains in it, or it is read-only
            pass
        return run

    @classmethod
    def find(cls, path: Path | str) -> tuple[RunDir, Path | None]:
        """The run a path belongs to, and the checkpoint where the path is one (complete, or ``CheckpointError``)."""
        folder = Path(path)
        if _STEP.match(folder.name) and folder.parent.name == "checkpoints":
            run = cls.open(folder.parent.parent)
            if not _is_complete(folder):
                raise CheckpointError(f"{folder}: not a complete checkpoint, it has no readable {STATE}")
            return run, folder
        return cls.open(folder), None

    @property
    def config_file(self) -> Path:
        """The configuration in full, TOML."""
        return self.path / "config.toml"

    @property
    def origin_file(self) -> Path:
        """Where the configuration came from, JSON."""
        return self.path / "origin.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def rollouts_dir(self) -> Path:
        """Tables of samples."""
        return self.path / "rollouts"

    @property
    def checkpoints_dir(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def model_dir(self) -> Path:
        """The base model, where the run made its own (``model.random``)."""
        return self.path / "model"

    @property
    def logs_dir(self) -> Path:
        """Where other loggers put their files."""
        return self.path / "logs"

    @property
    def messages_file(self) -> Path:
        """What the run had to say, with the time."""
        return self.logs_dir / "messages.log"

    @property
    def timeline_file(self) -> Path:
        """When each phase of each step ran: one JSON object a step."""
        return self.logs_dir / "timeline.jsonl"

    @property
    def wandb_id_file(self) -> Path:
        """The id under which W&B knows this run."""
        return self.logs_dir / "wandb_id"

    @property
    def plot_file(self) -> Path:
        """The reward curve."""
        return self.path / "reward.png"

    def config(self) -> dict[str, Any]:
        """The tree in ``config.toml``."""
        try:
            return tomllib.loads(self.config_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise CheckpointError(f"{self.config_file}: cannot be read: {error}") from None

    def base(self) -> Path:
        """The folder that relative paths in the configuration start from."""
        try:
            return Path(json.loads(self.origin_file.read_text(encoding="utf-8"))["base"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.origin_file}: cannot be read ({error}); was the run copied in part?"
            ) from None

    def write_config(self, config_tree: Mapping[str, Any]) -> None:
        """Replace ``config.toml`` (a resumed run may go on with more steps)."""
        write_atomically(self.config_file, tomli_w.dumps(dict(config_tree)))

    def append_metrics(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Add one line; NaN and infinities become null. Write it before the checkpoint of the same step."""
        self._append(self.metrics_file, {"step": step, **{key: finite(value) for key, value in values.items()}})

    def append_timeline(self, step: int, spans: Iterable[Span]) -> None:
        """Add one line, ``{"step": …, "spans": [[name, start, stop], …]}``, in seconds since the process took over."""
        self.logs_dir.mkdir(exist_ok=True)
        rows = [[span.name, round(span.start, 6), round(span.stop, 6)] for span in spans]
        self._append(self.timeline_file, {"step": step, "spans": rows})

    def timeline(self, step: int) -> list[Span]:
        """The spans of one step; empty where none were written."""
        rows = [row for row in read_rows(self.timeline_file) if row["step"] == step]
        return [Span(*span) for span in rows[-1]["spans"]] if rows else []

    def metrics(self) -> list[dict[str, Any]]:
        """Every line; one torn at the end by a kill is left out."""
        return read_rows(self.metrics_file)

    def rollouts_file(self, step: int, *, evaluation: bool = False) -> Path:
        """Table of the samples of one step, or of its evaluation."""
        return self.rollouts_dir / f"{'eval' if evaluation else 'step'}_{step:06d}.jsonl"

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]], *, evaluation: bool = False) -> Path:
        """Write a table in one go; values that JSON does not know are written as text."""
        self.rollouts_dir.mkdir(exist_ok=True)
        lines = [json.dumps(finite(dict(row)), ensure_ascii=False, default=str) + "\n" for row in rows]
        path = self.rollouts_file(step, evaluation=evaluation)
        write_atomically(path, "".join(lines), durable=False)
        return path

    def rollouts(self, step: int, *, evaluation: bool = False) -> list[dict[str, Any]]:
        """Rows of one table; empty where none was written."""
        return read_rows(self.rollouts_file(step, evaluation=evaluation))

    def checkpoint_dir(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` steps."""
        return self.checkpoints_dir / f"step_{step:06d}"

    @contextmanager
    def checkpoint(self, step: int, *, keep: int | None = None) -> Iterator[Path]:
        """Yield an empty folder to save into; on leaving it becomes ``checkpoints/step_…`` in one rename.

        Everything is on the disk before the rename, the metrics so far too. After an exception or a kill the older
        checkpoints are as they were. ``keep`` then removes all but that many of the newest.
        """
        final = self.checkpoint_dir(step)
        with self.lock():
            self.checkpoints_dir.mkdir(exist_ok=True)
            partial = self.checkpoints_dir / f"{PARTIAL}{final.name}"
            _remove(partial)
            partial.mkdir()
            try:
                yield partial
                if not _is_complete(partial):
                    raise CheckpointError(f"{partial}: the checkpoint of step {step} has no readable {STATE}")
                sync_tree(partial)
                if self.metrics_file.exists():
                    sync(self.metrics_file)
                self._replace(final, partial)
            except BaseException:
                self._clear_leftovers()
                raise
            if keep is not None:
                for _, old in self._checkpoints()[keep:]:
                    _remove(old)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint, ``None`` when there never was one.

        An incomplete one is passed over with a warning; ``CheckpointError`` when all are.
        """
        found = self._checkpoints()
        for step, path in found:
            if _is_complete(path):
                return step, path
            warnings.warn(f"{path} has no readable {STATE}: passing over this checkpoint", RuntimeWarning, stacklevel=2)
        if found:
            raise CheckpointError(f"{self.checkpoints_dir}: no checkpoint has a readable {STATE}; start a new run")
        return None

    def truncate_after(self, step: int) -> None:
        """Forget the metrics, samples, spans and evaluations of every step after ``step``, and any torn line."""
        for file in (self.metrics_file, self.timeline_file):
            if file.exists():
                rows = [row for row in read_rows(file) if row["step"] <= step]
                write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
        for path in self.rollouts_dir.glob("*.jsonl"):
            match = _ROWS.match(path.name)
            if match and int(match[1]) > step:
                path.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other process from writing here; released when this one ends, however it ends. Reentrant."""
        if self._lock_fd is not None:
            yield
            return
        self._lock_fd = self._acquire()
        try:
            self._clear_leftovers()
            yield
        finally:
            fd, self._lock_fd = self._lock_fd, None
            os.close(fd)

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        """Add one line to a file whose last one may be torn."""
        if path not in self._whole:
            cut_torn_tail(path)
            self._whole.add(path)
        with path.open("ab", buffering=0) as file:
            file.write((json.dumps(row) + "\n").encode())

    def _acquire(self) -> int:
        """File descriptor that holds the lock; the file itself stays, with the holder's process id in it."""
        fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise CheckpointError(
                f"{self.path} is in use by process {holder}: wait for it, stop it, or start a run of another name"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """Every finished checkpoint, newest first."""
        if not self.checkpoints_dir.is_dir():
            return []
        steps = [(int(match[1]), path) for path in self.checkpoints_dir.iterdir() if (match := _STEP.match(path.name))]
        return sorted(steps, reverse=True)

    def _replace(self, final: Path, partial: Path) -> None:
        """Rename ``partial`` to ``final``; an older one of the same step steps aside until the new one stands."""
        aside = final.with_name(f"{_REPLACED}{final.name}")
        if final.exists():
            final.rename(aside)
        partial.rename(final)
        sync(self.checkpoints_dir)
        _remove(aside)

    def _clear_leftovers(self) -> None:
        """Undo what a killed writer left: a replaced checkpoint returns to its place, temporaries go."""
        if self.checkpoints_dir.is_dir():
            for aside in self.checkpoints_dir.glob(f"{_REPLACED}*"):
                final = aside.with_name(aside.name.removeprefix(_REPLACED))
                if final.exists():
                    _remove(aside)
                else:
                    aside.rename(final)
            for partial in self.checkpoints_dir.glob(f"{PARTIAL}*"):
                _remove(partial)
        for folder in (self.path, self.rollouts_dir):
            for partial in folder.glob(f"{PARTIAL}*"):
                _remove(partial)


def _dated(folder: Path) -> Path:
    """A name from the clock that is still free."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    path, count = folder / name, 1
    while path.exists():
        count += 1
        path = folder / f"{name}_{count}"
    return path


def _is_complete(folder: Path) -> bool:
    """Whether the state is there and parses."""
    try:
        return isinstance(json.loads((folder / STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _remove(path: Path) -> None:
    """Delete a file or a folder if it is there; a checkpoint loses its state first, so half of one is never whole."""
    if path.is_dir():
        (path / STATE).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
