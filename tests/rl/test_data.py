"""Rows from every source, prompts, the cursor, the held-out split, demonstrations; and each error a user can make."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from posttrain.rl.config import DataConfig, WarmStartConfig
from posttrain.rl.data import (
    PromptSource,
    answer_after,
    columns_of,
    load_demonstrations,
    load_rows,
    make_prompts,
    prompt_column,
    split_eval,
)
from posttrain.rl.errors import ConfigError, DataError
from posttrain.rl.types import Prompt

ROWS = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(5)]


def plain(rows: Any) -> list[dict[str, Any]]:
    return [dict(rows[index]) for index in range(len(rows))]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def every_form(folder: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The same five rows in every form; name → (spec, further arguments)."""
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(folder / "rows.parquet"))
    table.to_csv(str(folder / "rows.csv"), index=False)
    table.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(folder / "splits"))
    write(folder / "rows.jsonl", "\n" + jsonl(ROWS))
    write(folder / "bom.jsonl", "\ufeff" + jsonl(ROWS))
    write(folder / "rows.json", json.dumps(ROWS))
    write(folder / "lines.json", jsonl(ROWS))
    write(folder / "files/train-00000.jsonl", jsonl(ROWS[:2]))
    write(folder / "files/train-00001.jsonl", jsonl(ROWS[2:]))
    write(folder / "files/test.jsonl", jsonl(ROWS[:1]))
    write(folder / "folders/train/a.jsonl", jsonl(ROWS))
    write(folder / "folders/test/a.jsonl", jsonl(ROWS[:1]))
    code = "def rows():\n    return ({'question': f'{n}+1=', 'answer': str(n + 1)} for n in range(5))\n"
    write(folder / "made.py", code + "def by_split(split):\n    assert split == 'train'\n    return rows()\n")
    forms: dict[str, tuple[Any, dict[str, Any]]] = {
        name: (str(folder / name), {})
        for name in (
            "rows.parquet",
            "rows.csv",
            "saved",
            "splits",
            "rows.jsonl",
            "bom.jsonl",
            "rows.json",
            "lines.json",
        )
    }
    forms["files"] = (str(folder / "files"), {})
    forms["folders"] = (str(folder / "folders"), {})
    forms["relative"] = ("rows.jsonl", {"base": folder})
    forms["function"] = ("made.py:rows", {"base": folder})
    forms["function with split"] = ("made.py:by_split", {"base": folder})
    forms["list"] = (ROWS, {})
    forms["generator"] = ((row for row in ROWS), {})
    forms["Dataset"] = (table, {})
    forms["IterableDataset"] = (table.to_iterable_dataset(), {})
    return forms


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Any, dict[str, Any]]]]:
    yield every_form(tmp_path_factory.mktemp("forms"))


FORMS = [
    "rows.parquet", "rows.csv", "saved", "splits", "rows.jsonl", "bom.jsonl", "rows.json", "lines.json", "files",
    "folders", "relative", "function", "function with split", "list", "generator", "Dataset", "IterableDataset",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form: str, forms: dict[str, tuple[Any, dict[str, Any]]]) -> None:
    spec, arguments = forms[form]
    rows = load_rows(spec, DataConfig(), **arguments)
    found = [{name: str(cell) for name, cell in row.items()} for row in plain(rows)]  # CSV makes numbers of answers
    assert found == ROWS
    assert columns_of(rows) == ["question", "answer"]


@pytest.mark.parametrize("form", ["splits", "files", "folders"])
def test_split_is_chosen_by_argument_or_configuration(form: str, forms: dict[str, tuple[Any, dict[str, Any]]]) -> None:
    spec, _ = forms[form]
    assert plain(load_rows(spec, DataConfig(), split="test")) == ROWS[:1]
    assert plain(load_rows(spec, DataConfig(split="test"))) == ROWS[:1]
    with pytest.raises(DataError, match=r"no .*split dev.*(train|test)"):
        load_rows(spec, DataConfig(split="dev"))


def test_hub_name_with_known_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"question": "q", "answer": "half of 2,468\n#### 1,234"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("openai/gsm8k", DataConfig(), split="test")
    assert plain(rows) == [{"question": "q", "answer": "1234"}] and columns_of(rows) == ["question", "answer"]
    load_rows("openai/gsm8k", DataConfig(subset="socratic"))
    load_rows("someone/else", DataConfig())
    assert asked == [
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", "socratic", "train"),
        ("someone/else", None, "train"),
    ]


def test_hub_failure_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"dataset a/b .main., split train: no route; check data.dataset"):
        load_rows("a/b", DataConfig(subset="main"))


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("steps\n#### 72", "72"),
        ("#### 1,234,567 ", "1234567"),
        ("a #### b #### -1,000.50", "-1000.50"),
        ("#### (1,2)", "(1,2)"),
        ("#### 1,2345", "1,2345"),
        ("no mark 1,000", "no mark 1000"),
    ],
)
def test_answer_after(answer: str, kept: str) -> None:
    assert answer_after(answer, "####") == kept


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": 1}\n{"prompt": \n', r"a\.jsonl:2: not JSON"),
        ("b.jsonl", '{"prompt": 1}\n\n[1]\n', r"b\.jsonl:3: a row is an object, not list"),
        ("c.json", '[{"prompt": 1},\n {"prompt": }]', r"c\.json:2: not JSON"),
        ("d.json", '[{"prompt": 1}, 2]', r"d\.json: item 1 is int"),
        ("e.jsonl", "", r"e\.jsonl: no rows"),
        ("f.parquet", "nonsense", "not a readable parquet file"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / name, text), DataConfig())


def test_other_wrong_datasets(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    write(tmp_path / "make.py", "def number(): return 3\ndef fails(): raise KeyError('x')\n")
    (tmp_path / "empty").mkdir()
    table = datasets.Dataset.from_list(ROWS)
    for spec, message in [
        (str(tmp_path / "latin.jsonl"), "UTF-8"),
        ("absent.jsonl", "no such file or folder"),
        ("./absent", "no such file or folder"),
        (str(tmp_path / "empty"), "no file for split train"),
        ("make.py:number", "returned int; a dataset function returns an iterable of dicts"),
        ("make.py:fails", "raised KeyError"),
        ([], "no rows"),
        (["text"], "a row is a dict of columns, not str"),
        ({"prompt": "x"}, "one dict: pass a list"),
        (datasets.DatasetDict({"train": table}), "one split of it"),
        (3, "not int"),
    ]:
        with pytest.raises(DataError, match=message):
            load_rows(spec, DataConfig(), base=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"has no nothing"):
        load_rows("make.py:nothing", DataConfig(), base=tmp_path)
    with pytest.raises(DataError, match=r"answer_after: no column answer.*question"):
        load_rows([{"question": "q"}], DataConfig(answer_after="####"))


def test_prompt_column_is_found_or_named() -> None:
    assert prompt_column(["answer", "problem", "question"], DataConfig()) == "question"
    assert prompt_column(["messages", "prompt"], DataConfig()) == "prompt"
    assert prompt_column(["text", "prompt"], DataConfig(prompt_column="text")) == "text"
    with pytest.raises(DataError, match=r"'text' is no column of the dataset: question, answer"):
        prompt_column(["question", "answer"], DataConfig(prompt_column="text"))
    with pytest.raises(DataError, match=r"set data.prompt_column to one of: text, label"):
        prompt_column(["text", "label"], DataConfig())


def test_text_rows_stay_text_and_other_columns_are_kept() -> None:
    (prompt, *_) = make_prompts(ROWS, DataConfig())
    assert prompt == Prompt("eval-0", "0+1=", {"answer": "1"})


def test_system_prompt_and_worked_turns_stand_in_front() -> None:
    worked = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    config = DataConfig(system_prompt="Add.", worked_turns=worked)
    system, user = {"role": "system", "content": "Add."}, {"role": "user", "content": "0+1="}
    assert make_prompts(ROWS, config)[0].source == [system, *worked, user]
    own = {"role": "system", "content": "Own."}
    rows = [{"prompt": [own, user]}, {"prompt": [user]}]
    assert [prompt.source for prompt in make_prompts(rows, config)] == [[own, *worked, user], [system, *worked, user]]
    assert rows[0]["prompt"] == [own, user], "rows are never changed"


def test_message_keys_that_datasets_filled_with_none_are_dropped() -> None:
    rows = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "a", "name": None}, {"role": "user", "content": "b", "name": "n"}]}]
    )
    assert make_prompts(rows, DataConfig())[0].source == [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b", "name": "n"},
    ]


@pytest.mark.parametrize("value", [None, 3, [], ["hi"], [{"content": "hi"}], {"role": "user", "content": "hi"}])
def test_prompt_that_is_neither_text_nor_messages_names_the_row(value: Any) -> None:
    with pytest.raises(DataError, match=r"row eval-1: prompt is .* a prompt is text or a list of"):
        make_prompts([{"prompt": "fine"}, {"prompt": value}], DataConfig())


def test_row_that_lacks_the_prompt_column_is_named() -> None:
    source = PromptSource([{"prompt": "a"}] * 1000 + [{"text": "b"}], DataConfig(shuffle=False), 0)
    source.take(1000)
    with pytest.raises(DataError, match=r"row 0-1000: no prompt; it has text"):
        source.take(1)


def test_each_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    prompts = PromptSource(ROWS, DataConfig(), 3).take(15)
    epochs = [[prompt.id for prompt in prompts[start : start + 5]] for start in (0, 5, 10)]
    for number, ids in enumerate(epochs):
        assert sorted(ids) == [f"{number}-{row}" for row in range(5)]
    assert len({tuple(name.split("-")[1] for name in ids) for ids in epochs}) > 1
    for prompt in prompts:
        assert prompt.source == ROWS[int(prompt.id.split("-")[1])]["question"]


def test_order_depends_on_the_seed_alone() -> None:
    def order(seed: int) -> list[str]:
        return [prompt.id for prompt in PromptSource(ROWS, DataConfig(), seed).take(10)]

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(8)}) > 4
    unshuffled = PromptSource(ROWS, DataConfig(shuffle=False), 1).take(7)
    assert [p.id for p in unshuffled] == ["0-0", "0-1", "0-2", "0-3", "0-4", "1-0", "1-1"]


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 6, 13])
def test_restored_cursor_continues_exactly(taken: int) -> None:
    whole = PromptSource(ROWS, DataConfig(), 7)
    whole.take(taken)
    state = json.loads(json.dumps(whole.state()))
    wanted = whole.take(12)
    fresh = PromptSource(ROWS, DataConfig(), 7)
    fresh.restore(state)
    assert fresh.take(12) == wanted
    assert fresh.state() == whole.state()


@pytest.mark.parametrize(
    ("rows", "config", "seed", "key"),
    [
        (ROWS[:4], DataConfig(), 7, "rows"),
        ([*ROWS[:4], {"question": "9+9=", "answer": "18"}], DataConfig(), 7, "digest"),
        (ROWS, DataConfig(), 8, "seed"),
        (ROWS, DataConfig(shuffle=False), 7, "shuffle"),
    ],
)
def test_cursor_of_other_data_is_refused(rows: list[Any], config: DataConfig, seed: int, key: str) -> None:
    state = PromptSource(ROWS, DataConfig(), 7).state()
    with pytest.raises(DataError, match=rf"{key} was .*same dataset"):
        PromptSource(rows, config, seed).restore(state)


def characters(prompt: Prompt) -> Prompt:
    assert isinstance(prompt.source, str)
    return Prompt(prompt.id, prompt.source, prompt.columns, tuple(map(ord, prompt.source)))


def test_long_prompts_are_left_out_counted_and_the_cursor_stays_exact() -> None:
    rows = [{"prompt": "x" * n} for n in range(1, 9)]
    config = DataConfig(max_prompt_tokens=5)
    source = PromptSource(rows, config, 2, encode=characters)
    first = source.take(7)
    assert max(len(prompt.prompt_ids) for prompt in first) == 5
    assert Counter(prompt.id for prompt in source.take(8)).most_common(1)[0][1] == 1
    assert source.dropped == 9, "three rows are too long, in each of three epochs"
    state = source.state()
    wanted = source.take(6)
    fresh = PromptSource(rows, config, 2, encode=characters)
    fresh.restore(state)
    assert fresh.take(6) == wanted and fresh.dropped == source.dropped


def test_when_nothing_fits_it_says_so_instead_of_searching_for_ever() -> None:
    source = PromptSource(ROWS, DataConfig(max_prompt_tokens=3), 0, encode=characters)
    with pytest.raises(DataError, match=r"all 5 prompts are longer than data.max_prompt_tokens = 3"):
        source.take(1)


def test_split_eval_holds_out_by_content() -> None:
    rows = [{"question": f"Q {n % 10}", "answer": str(n)} for n in range(30)]
    rows.append({"question": " q  3\n", "answer": "a duplicate but for blanks and case"})
    train, held_out = split_eval(rows, 4, 0)
    kept = {row["question"].strip().casefold().replace("  ", " ") for row in plain(train)}
    chosen = [row["question"].casefold() for row in plain(held_out)]
    assert len(chosen) == len(set(chosen)) == 4 and not kept & set(chosen)
    assert len(train) == 31 - 12 - ("q 3" in chosen), "three copies of each held-out prompt leave training"
    assert [plain(part) for part in split_eval(rows, 4, 0)] == [plain(train), plain(held_out)]
    different = {tuple(row["question"] for row in plain(split_eval(rows, 4, seed)[1])) for seed in range(6)}
    assert len(different) > 3


def test_split_eval_compares_messages_and_keeps_datasets_lazy() -> None:
    rows = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": text}], "n": n} for n, text in enumerate(["a", "b", "A ", "c", "b"])]
    )
    train, held_out = split_eval(rows, 1, 1)
    assert isinstance(train, datasets.Dataset) and isinstance(held_out, datasets.Dataset)
    words = [[row["prompt"][0]["content"].strip().casefold() for row in plain(part)] for part in (train, held_out)]
    assert len(words[1]) == 1 and words[1][0] not in words[0] and set(words[0]) | set(words[1]) == {"a", "b", "c"}


def test_split_eval_on_cut_answers_and_a_column_of_ones_own() -> None:
    rows = load_rows([{"text": f"t{n}", "answer": f"#### {n}"} for n in range(6)], DataConfig(answer_after="####"))
    train, held_out = split_eval(rows, 2, 0, column="text")
    assert sorted(row["answer"] for row in [*plain(train), *plain(held_out)]) == list("012345")
    with pytest.raises(DataError, match=r"cannot hold out 6 rows of 6 different prompts"):
        split_eval(rows, 6, 0, column="text")


def test_demonstrations_as_columns_or_as_messages() -> None:
    config, warm = DataConfig(answer_after="####", prompt_column="question"), WarmStartConfig()
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    assert load_demonstrations([{"prompt": "1+1=", "completion": "2"}], warm, config) == [
        (Prompt("warm-0", "1+1=", {}), "2")
    ]
    assert load_demonstrations([{"messages": turns}], warm, config) == [(Prompt("warm-0", turns[:1], {}), "2")]
    both = [{"question": "1+1=", "completion": [turns[1]], "n": 1}]
    assert load_demonstrations(both, warm, config) == [(Prompt("warm-0", "1+1=", {"n": 1}), "2")]
    column = WarmStartConfig(completion_column="gold")
    system = load_demonstrations([{"prompt": "1+1=", "gold": "2"}], column, DataConfig(system_prompt="Add."))
    assert system[0][0].source == [{"role": "system", "content": "Add."}, turns[0]] and system[0][1] == "2"


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt": "a", "completion": ""}, {"prompt": "a", "completion": 3}])
def test_demonstration_without_text_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"demonstration 1: no text in column completion.*completion_column"):
        load_demonstrations([{"prompt": "a", "completion": "b"}, row], WarmStartConfig(), DataConfig())
