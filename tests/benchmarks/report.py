"""Figures as JSON lines, as soon as they are there, and as Markdown at the end."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_KEY = '{"measurement": '
Record = dict[str, Any]


def emit(measurement: str, case: str, **figures: Any) -> None:
    """Print one record and flush it: whatever happens later, it is there."""
    rounded = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps({"measurement": measurement, "case": case, **rounded}), flush=True)


@contextmanager
def attempt(measurement: str, case: str) -> Iterator[None]:
    """Let the other measurements run where one fails; the failure becomes a record."""
    try:
        yield
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        emit(measurement, case, error=short(error))


def short(error: Exception) -> str:
    """Kind and first line; of an error in a Ray actor those of what was raised there."""
    inner = getattr(error, "cause", None) or error
    return f"{type(inner).__name__}: {(str(inner).strip() or 'no message').splitlines()[0][:200]}"


def records(text: str) -> list[Record]:
    """The records in a log, whatever stands between them."""
    return [json.loads(line) for line in text.splitlines() if line.startswith(_KEY)]


def tables(found: Sequence[Record], targets: dict[str, str]) -> str:
    """Markdown: a table a measurement, a row a case, a column a figure; ``targets`` stand beside the figures' names."""
    parts = []
    for measurement in dict.fromkeys(record["measurement"] for record in found):
        rows = [record for record in found if record["measurement"] == measurement]
        keys = dict.fromkeys(key for row in rows for key in row)
        columns = [key for key in keys if key not in ("measurement", "case")]
        wanted = {key: targets.get(f"{measurement}.{key}") for key in columns}
        heads = [f"{key} ({target})" if target else key for key, target in wanted.items()]
        lines = [f"| {measurement} | {' | '.join(heads)} |", "|" + "---|" * (len(columns) + 1)]
        lines += [f"| {row['case']} | {' | '.join(_cell(row.get(key)) for key in columns)} |" for row in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return format(value, ".4g") if isinstance(value, float) else str(value).replace("|", "/")
