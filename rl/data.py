"""Rows → prompts: which column is the prompt, what stands around it, in which order, and where the cursor is."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.rl.config import DataConfig, WarmStartConfig
from posttrain.rl.errors import DataError
from posttrain.rl.rows import KNOWN, Row, Rows, read_rows, take_rows
from posttrain.rl.types import Message, Prompt

PROMPT_COLUMNS = ("prompt", "messages", "question", "problem")
"""Where the prompt is looked for when ``data.prompt_column`` is not set, in this order."""


def load_rows(
    spec: str | Iterable[Row], config: DataConfig, *, split: str | None = None, base: Path | None = None
) -> Rows:
    """Rows of a dataset: a hub name, a local file or folder, ``module:function``, or rows handed over as they are.

    ``split`` is by default ``config.split``; paths are relative to ``base``. The result is indexable and may be lazy.
    Raises ``DataError`` where nothing can be read, nothing is there, or the rows are not dicts.
    """
    known = KNOWN.get(spec) if isinstance(spec, str) else None
    subset = config.subset or (known.subset if known else None)
    rows = read_rows(spec, subset=subset, split=split or config.split, base=base)
    answer_after = config.answer_after or (known.answer_after if known else None)
    name = spec if isinstance(spec, str) else "the rows handed over"
    if len(rows) == 0:
        raise DataError(f"{name}: no rows" + (f" in split {split or config.split}" if isinstance(spec, str) else ""))
    if not isinstance(rows[0], Mapping):
        raise DataError(f"{name}: a row is a dict of columns, not {type(rows[0]).__name__}: {str(rows[0])[:60]}")
    if answer_after:
        return _AnswerAfter(rows, answer_after)
    return rows


def columns_of(rows: Rows) -> list[str]:
    """Column names; of plain lists, those that every one of the first 1000 rows has."""
    names = getattr(rows, "column_names", None)
    if isinstance(names, list):
        return [str(name) for name in names]
    first = list(rows[0])
    for index in range(1, min(len(rows), 1000)):
        first = [name for name in first if name in rows[index]]
    return first


def prompt_column(columns: Sequence[str], config: DataConfig) -> str:
    """The configured prompt column, or the first usual one there is; raises ``DataError`` naming what there is."""
    there = ", ".join(columns) or "none"
    if config.prompt_column is not None:
        if config.prompt_column not in columns:
            raise DataError(f"data.prompt_column = {config.prompt_column!r} is no column of the dataset: {there}")
        return config.prompt_column
    for name in PROMPT_COLUMNS:
        if name in columns:
            return name
    raise DataError(f"no column {', '.join(PROMPT_COLUMNS)} in the dataset: set data.prompt_column to one of: {there}")


def make_prompt(row: Row, config: DataConfig, column: str, prompt_id: str) -> Prompt:
    """One row as a prompt: text or messages, the system and worked turns in front, every other column kept.

    Raises ``DataError`` naming the row for a prompt that is neither text nor messages.
    """
    if column not in row:
        raise DataError(f"row {prompt_id}: no {column}; it has {', '.join(map(str, row)) or 'nothing'}")
    value = row[column]
    columns = {str(name): cell for name, cell in row.items() if name != column}
    if isinstance(value, str):
        before = _turns_before(config)
        source: str | list[Message] = [*before, {"role": "user", "content": value}] if before else value
    else:
        source = _with_turns_before(_messages(value, column, prompt_id), config)
    return Prompt(prompt_id, source, columns)


def make_prompts(rows: Rows, config: DataConfig, *, prefix: str = "eval", limit: int | None = None) -> list[Prompt]:
    """The first ``limit`` rows once, in order, with ids ``"<prefix>-<row>"``: an evaluation set."""
    column = prompt_column(columns_of(rows), config)
    count = len(rows) if limit is None else min(limit, len(rows))
    return [make_prompt(rows[index], config, column, f"{prefix}-{index}") for index in range(count)]


class PromptSource:
    """An endless stream of prompts over rows, in an order that ``seed`` decides, with a cursor that can be saved."""

    def __init__(
        self, rows: Rows, config: DataConfig, seed: int, *, encode: Callable[[Prompt], Prompt] | None = None
    ) -> None:
        """``encode`` fills in ``prompt_ids``; those longer than ``config.max_prompt_tokens`` are left out."""
        if len(rows) == 0:
            raise DataError("the dataset has no rows")
        self._rows = rows
        self._config = config
        self._seed = seed
        self._encode = encode
        self._column = prompt_column(columns_of(rows), config)
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)
        self._digest = _digest(rows)
        self.dropped = 0
        """Prompts left out for their length so far; a row counts again in each epoch."""

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts, ids ``"<epoch>-<row>"``; raises ``DataError`` when no row of the dataset fits."""
        prompts: list[Prompt] = []
        dropped_in_a_row = 0
        while len(prompts) < n:
            row, prompt_id = self._next_row()
            prompt = make_prompt(self._rows[row], self._config, self._column, prompt_id)
            if self._encode is not None:
                prompt = self._encode(prompt)
                if len(prompt.prompt_ids) > self._config.max_prompt_tokens:
                    self.dropped += 1
                    dropped_in_a_row += 1
                    if dropped_in_a_row >= len(self._rows):
                        raise DataError(
                            f"all {len(self._rows)} prompts are longer than data.max_prompt_tokens = "
                            f"{self._config.max_prompt_tokens} (this one: {len(prompt.prompt_ids)}): raise it"
                        )
                    continue
            dropped_in_a_row = 0
            prompts.append(prompt)
        return prompts

    def state(self) -> dict[str, Any]:
        """JSON-ready cursor: what comes next, and what it was taken from."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "dropped": self.dropped,
            "seed": self._seed,
            "shuffle": self._config.shuffle,
            "rows": len(self._rows),
            "digest": self._digest,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; raises ``DataError`` when the data, its order or the seed changed."""
        mine = self.state()
        for key in ("seed", "shuffle", "rows", "digest"):
            if state.get(key) != mine[key]:
                raise DataError(
                    f"the saved position does not fit the data: {key} was {state.get(key)}, is {mine[key]}; "
                    "resume with the same dataset, seed and data.shuffle, or start a new run"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self.dropped = int(state["dropped"])
        self._order = self._order_of(self._epoch)

    def _next_row(self) -> tuple[int, str]:
        if self._position == len(self._order):
            self._epoch += 1
            self._position = 0
            self._order = self._order_of(self._epoch)
        row = self._order[self._position]
        self._position += 1
        return row, f"{self._epoch}-{row}"

    def _order_of(self, epoch: int) -> Sequence[int]:
        if not self._config.shuffle:
            return range(len(self._rows))
        order = list(range(len(self._rows)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


def split_eval(rows: Rows, n: int, seed: int, *, column: str | None = None) -> tuple[Rows, Rows]:
    """``(training rows, n held-out rows)``, disjoint by content: no held-out prompt (blanks and case aside) stays in
    training, and held-out prompts differ from each other. Raises ``DataError`` when nothing would be left.
    """
    key = column or prompt_column(columns_of(rows), DataConfig())
    seen: dict[str, list[int]] = {}
    for index in range(len(rows)):
        seen.setdefault(_content(rows[index].get(key)), []).append(index)
    if n >= len(seen):
        raise DataError(f"cannot hold out {n} rows of {len(seen)} different prompts: lower data.eval_rows")
    order = list(seen)
    random.Random(f"{seed}/held out").shuffle(order)
    held_out = set(order[:n])
    train = sorted(index for content, places in seen.items() if content not in held_out for index in places)
    return take_rows(rows, train), take_rows(rows, sorted(seen[content][0] for content in held_out))


def load_demonstrations(
    spec: str | Iterable[Row], warm_start: WarmStartConfig, config: DataConfig, *, base: Path | None = None
) -> list[tuple[Prompt, str]]:
    """``(prompt, completion text)`` of every row, for the supervised warm start. A row of ``messages`` that ends in the
    assistant's turn is its own demonstration.
    """
    plain = config.model_copy(update={"subset": None, "split": "train", "answer_after": None})
    rows = load_rows(spec, plain, base=base)
    columns = columns_of(rows)
    own = config.prompt_column if config.prompt_column in columns else None
    column = own or prompt_column(columns, config.model_copy(update={"prompt_column": None}))
    pairs: list[tuple[Prompt, str]] = []
    for index in range(len(rows)):
        row = dict(rows[index])
        completion = row.pop(warm_start.completion_column, None)
        turns = row.get(column)
        if completion is None and isinstance(turns, list) and turns and turns[-1].get("role") == "assistant":
            completion = turns[-1].get("content")
            row[column] = turns[:-1]
        if isinstance(completion, list) and len(completion) == 1:
            completion = completion[0].get("content")
        if not isinstance(completion, str) or not completion:
            raise DataError(
                f"demonstration {index}: no text in column {warm_start.completion_column} "
                f"(columns: {', '.join(columns)}); set warm_start.completion_column"
            )
        pairs.append((make_prompt(row, config, column, f"warm-{index}"), completion))
    return pairs


def _digest(rows: Rows) -> str:
    """Of up to 64 rows spread over the data: enough to notice another dataset, cheap on a large one."""
    count = len(rows)
    chosen = sorted({index * count // 64 for index in range(64)} | {count - 1})
    text = json.dumps([dict(rows[index]) for index in chosen], sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _turns_before(config: DataConfig) -> list[Message]:
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt is not None else []
    return [*system, *(dict(turn) for turn in config.worked_turns)]


def _with_turns_before(turns: list[Message], config: DataConfig) -> list[Message]:
    """The row's own system turn stays first, and is in the configured one's place."""
    before = _turns_before(config)
    if turns[0]["role"] == "system":
        worked = [turn for turn in before if turn["role"] != "system"]
        return [turns[0], *worked, *turns[1:]]
    return [*before, *turns]


def _messages(value: object, column: str, prompt_id: str) -> list[Message]:
    turns = list(value) if isinstance(value, Sequence) and not isinstance(value, bytes) else []
    if not turns or not all(isinstance(turn, Mapping) and "role" in turn and "content" in turn for turn in turns):
        raise DataError(
            f"row {prompt_id}: {column} is {str(value)[:60]!r} ({type(value).__name__}); a prompt is text or a list of "
            '{"role": …, "content": …}'
        )
    # datasets fills in keys that other rows have with None
    return [{key: cell for key, cell in turn.items() if cell is not None or key == "content"} for turn in turns]


def _content(value: object) -> str:
    """What makes two prompts the same."""
    if isinstance(value, str):
        return re.sub(r"\s+", " ", value).strip().casefold()
    if isinstance(value, Sequence):
        return json.dumps([[str(turn.get("role")), _content(turn.get("content"))] for turn in value])
    return repr(value)


class _AnswerAfter(Sequence[Row]):
    """Rows whose ``answer`` is cut down, as they are read."""

    def __init__(self, rows: Rows, mark: str) -> None:
        if "answer" not in columns_of(rows):
            raise DataError(
                f"data.answer_after: no column answer in the dataset; there are: {', '.join(columns_of(rows))}"
            )
        self._rows = rows
        self._mark = mark

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = dict(self._rows[index])
        row["answer"] = answer_after(row["answer"], self._mark)
        return row


def answer_after(answer: object, mark: str) -> str:
    """What follows the last ``mark``, stripped, without thousands commas; the whole answer where the mark is absent."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", str(answer).rpartition(mark)[2].strip())
