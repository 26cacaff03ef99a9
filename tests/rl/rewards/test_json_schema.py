"""JSON by schema: what is read, what fits, what is earned in part, and what can never be fetched or waited for."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from posttrain.rl.errors import ConfigError, RewardError
from posttrain.rl.rewards import Rubric, resolve
from posttrain.rl.rewards import json_schema as module
from posttrain.rl.rewards.decorator import explanation_of, tag_of
from posttrain.rl.rewards.json_schema import json_schema
from posttrain.rl.types import Completion, Prompt

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"$ref": "#/$defs/age"},
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": True,
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}
GOOD = '{"name": "Ann", "age": 7, "city": "Rome"}'


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (GOOD, 1.0),
        (f"\n {GOOD} \n", 1.0),
        (f"Here it is:\n```json\n{GOOD}\n```\nDone.", 1.0),
        (f"```\n{{}}\n```\nno, rather\n```\n{GOOD}\n```", 1.0),
        (f"```\n{GOOD}\n```\nno, rather\n```\n{{}}\n```", 0.0),  # the last block counts
        (f"```json\n{GOOD}", 0.0),  # never closed
        (f"so: {GOOD}", 0.0),
        (json.dumps({"name": "a```b\n```", "age": 1, "city": "```"}, indent=1), 1.0),
        ("```json\n" + json.dumps({"name": "a\n```\nb", "age": 1, "city": "```"}) + "\n```", 1.0),
        ('{"name": "Ann", "age": -7, "city": "Rome"}', 0.0),
        ('{"name": "Ann", "age": 7}', 0.0),
        ('{"name": "Ann", "age": NaN, "city": "Rome"}', 0.0),
        ('{"name": "Ann", "age": 7, "city": "Rome",}', 0.0),
        ("[" * 100_000, 0.0),
        ("[" * 900 + "]" * 900, 0.0),
        ("9" * 100_000, 0.0),
        ("\ud800", 0.0),
        ("", 0.0),
    ],
)
def test_a_reply_and_its_score(completion: str, score: float) -> None:
    assert json_schema(PERSON)(completion=completion) == score


def test_the_whole_reply_only() -> None:
    strict = json_schema(PERSON, whole=True)
    assert strict(completion=GOOD) == 1.0
    assert strict(completion=f"```json\n{GOOD}\n```") == 0.0


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (GOOD, 1.0),
        ('{"name": "Ann", "age": -7, "city": "Rome"}', 0.6 * 2 / 3),
        ('{"name": "Ann", "age": 7}', 0.6 * 2 / 3),
        ('{"name": 1, "age": 7, "city": 0, "tags": ["a", "a"]}', 0.6 * 2 / 4),  # age and city of four
        ('{"tags": []}', 0.6 * 1 / 4),  # an optional property counts where it is given
        ('{"more": 1}', 0.0),
        ("[]", 0.0),
        ("so", 0.0),
    ],
)
def test_credit_in_part(completion: str, score: float) -> None:
    assert json_schema(PERSON, partial=0.6)(completion=completion) == pytest.approx(score)


def test_schema_of_a_file_and_of_the_row(tmp_path: Path) -> None:
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    from_file = resolve("json_schema", settings={"schema": str(tmp_path / "person.json"), "name": "person"})
    assert from_file(completion=GOOD) == 1.0 and tag_of(from_file).name == "person"
    by_row = resolve("json_schema")
    assert by_row(completion="3", schema={"type": "integer"}) == 1.0
    assert by_row(completion="3", schema='{"type": "string"}') == 0.0
    with pytest.raises(RewardError, match=r"column schema: no JSON schema: 'strin' .* at \$\.type"):
        by_row(completion="3", schema={"type": "strin"})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, r"no JSON schema: 'strin'"),
        ({"pattern": "("}, r"no JSON schema: '\('"),
        ({"$ref": "#/$defs/nobody"}, r"\$ref #/\$defs/nobody leads nowhere"),
        ({"items": {"$ref": "#nobody"}}, r"\$ref #nobody leads nowhere"),
        ({"properties": {"a": {"$ref": "http://127.0.0.1:9/schema.json"}}}, r"leads nowhere: .*nothing is fetched"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "nothing is fetched"),
        ("nowhere/schema.json", "not a readable file"),
        ([1], "a JSON schema is an object"),
        ({"const": {1, 2}}, "set is not JSON serializable"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_at_once(schema: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        json_schema(schema)
    with pytest.raises(ConfigError, match="partial"):
        json_schema(True, partial=2)


def test_references_inside_the_schema_and_to_the_metaschema_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    tree = {
        "$id": "https://example.invalid/tree",
        "type": "object",
        "properties": {"children": {"type": "array", "items": {"$ref": "#"}}, "leaf": {"$ref": "leaf"}},
        "additionalProperties": False,
        "$defs": {"leaf": {"$id": "leaf", "type": "integer"}},
    }
    fits = json_schema(tree)
    assert fits(completion='{"children": [{"leaf": 3}, {"children": []}]}') == 1.0
    assert fits(completion='{"children": [{"leaf": "3"}]}') == 0.0
    assert json_schema({"$ref": "https://json-schema.org/draft/2020-12/schema"})(completion='{"type": "object"}') == 1.0
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3, "exclusiveMinimum": True}
    assert [json_schema(old)(completion=text) for text in ("3", "4")] == [0.0, 1.0]


@pytest.mark.parametrize("text", ["1" + "0" * 4000, "1e999", "-1e999"])
def test_a_number_beyond_floats_does_not_raise(text: str) -> None:
    assert json_schema({"multipleOf": 0.7})(completion=text) == 0.0


@pytest.mark.parametrize(
    ("completion", "why"),
    [
        (GOOD, "fits the schema"),
        ('{"name": "Ann", "age": -7, "city": "Rome"}', "$.age: -7 is less than the minimum of 0"),
        ("so", "no JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[" * 100_000, "nested too deeply to be read"),
    ],
)
def test_it_says_why(completion: str, why: str) -> None:
    explain = explanation_of(json_schema(PERSON))
    assert explain is not None and explain(completion=completion) == why


def test_in_a_run_a_reply_made_to_take_forever_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 1.0)
    rubric = Rubric([json_schema({"type": "string", "pattern": "^(a+)+$"})])
    texts = ['"aaa"', '"' + "a" * 64 + '!"', '"b"', "\ud800"]
    group = [(Prompt("0-0", "say a", {}), [Completion((1,), (-0.1,), text, "stop", 0) for text in texts])]
    try:
        [scored] = asyncio.run(rubric.score(group))
    finally:
        rubric.close()
    assert [rollout.rewards["json_schema"] for rollout in scored.rollouts] == [1.0, 0.0, 0.0, 0.0]
    assert [rollout.failures.get("json_schema") for rollout in scored.rollouts] == [None, "timeout", None, None]
