"""The judge against an endpoint on this machine: what it asks, how it reads, what it tries again, what it refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import email.utils
import json
from collections.abc import Iterator, Sequence
from typing import Any

import cloudpickle
import pytest

from posttrain.rl.errors import ConfigError, RewardError
from posttrain.rl.rewards import Rubric, chat_endpoint, resolve
from posttrain.rl.rewards.decorator import explanation_of
from posttrain.rl.rewards.judge import Judge
from posttrain.rl.types import Completion, Prompt, Rollout
from tests.rl.rewards.fake_endpoint import Answer, FakeEndpoint, Reply, Request

GOOD = Reply('{"score": 0.75}')


def settings(endpoint: FakeEndpoint, **others: Any) -> dict[str, Any]:
    return {"model": "m", "base_url": endpoint.base_url, "retries": 2, **others}


def one_after_another(*replies: Reply) -> Answer:
    """The last one again and again."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def scored(judge: Any, texts: Sequence[str] = ("yes",), **columns: Any) -> list[Rollout]:
    """Through the rubric, as the loop does."""
    rubric = Rubric([judge])
    rubric.check(columns)
    group = (Prompt("p", "2+2?", columns), [Completion((), (), text, "stop", 0) for text in texts])
    return asyncio.run(rubric.score([group]))[0].rollouts


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_endpoint, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def good() -> Iterator[FakeEndpoint]:
    with FakeEndpoint(lambda _: GOOD).open() as endpoint:
        yield endpoint


def test_a_request_holds_model_rubric_and_texts_and_the_score_is_mapped_onto_0_to_1(good: FakeEndpoint) -> None:
    judge = resolve("judge", settings=settings(good, rubric="Is it {answer}?", scale=[-1, 1], request={"top_p": 0.5}))
    [rollout] = scored(judge, ["It is {prompt}."], answer=4)
    assert rollout.rewards == {"judge": 0.875}  # 0.75 on a scale from -1 to 1
    [request] = good.requests
    assert request.path == "/v1/chat/completions"
    assert request.body.keys() == {"model", "messages", "top_p"}
    assert (request.body["model"], request.body["top_p"]) == ("m", 0.5)
    assert "<task>\n2+2?\n</task>" in request.text
    assert "<response>\nIt is {prompt}.\n</response>\n\nIs it 4?" in request.text  # what is filled in stays as it is
    assert 'JSON, {"score": S}: a number from -1 (worst) to 1 (best)' in request.text
    assert "authorization" not in request.headers


def test_a_template_asks_for_what_it_names_and_leaves_other_braces(good: FakeEndpoint) -> None:
    judge = Judge(
        **settings(good, template='{completion}|{hint}|{"score": {x}}', columns=["hint"], request={}, scale=(0, 1))
    )
    with pytest.raises(RewardError, match="asks for hint, which is no column"):
        Rubric([judge]).check(["answer"])
    scored(judge, ["c"], hint="h", answer="unused")
    assert good.requests[0].body == {
        "model": "m",
        "messages": [{"role": "user", "content": 'c|h|{"score": {x}}'}],
    }


def test_a_chat_is_shown_turn_by_turn(good: FakeEndpoint) -> None:
    judge = Judge(**settings(good, template="{prompt}~{completion}"))
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    group = (Prompt("p", turns, {}), [Completion((), (), "Hello", "stop", 0)])
    asyncio.run(Rubric([judge]).score([group]))
    assert good.requests[0].text == "system: Be short.\n\nuser: Hi~Hello"


@pytest.mark.parametrize(
    ("parse", "reply", "score"),
    [
        ("json", '{"score": 3}', 0.3),
        ("json", 'Fine.\n```json\n{"score": 7.5, "why": {"a": 1}}\n```', 0.75),
        ("json", '{"score": 1} or rather {"score": 2}', 0.2),
        ("json", '{"score": "4"}', 0.4),
        ("json", '<think>{"score": 1}</think>{"score": 9}', 0.9),
        ("json", '{"score": 11}', None),
        ("json", '{"score": -1}', None),
        ("json", '{"score": true}', None),
        ("json", '{"score": null}', None),
        ("json", '{"score": NaN}', None),
        ("json", '{"score": 1e999}', None),
        ("json", '{"grade": 5}', None),
        ("json", "score: 5", None),
        ("json", '<think>{"score": 1}</think>', None),
        ("json", "", None),
        ("json", '{"a":' * 3000, None),
        ("tag", "<score>6</score>", 0.6),
        ("tag", "<score>1</score> no: <SCORE> 8/10 </SCORE>", 0.8),
        ("tag", "6", None),
        ("number", "I give 3 of 10: 8/10.", 0.8),
        ("number", "Rule 1 applies, so 2.5", 0.25),
        ("number", "none", None),
        ("number", "٣", None),
    ],
)
def test_reading_a_score(parse: Any, reply: str, score: float | None) -> None:
    judge = Judge("m", "http://localhost/v1", parse=parse, scale=(0, 10))
    if score is None:
        with pytest.raises(ValueError, match="score"):
            judge.read(reply)
    else:
        assert judge.read(reply) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    "bad",
    [
        Reply(status=500, body="oh"),
        Reply(status=429, body='{"error": {"message": "slow down", "type": "rate_limit_error"}}'),
        Reply(drop=True),
        Reply(body="<html>"),
        Reply(body='{"choices": []}'),
        Reply(None),
        Reply("I would rather not say."),
        Reply('{"score": 0.5}', finish_reason="length"),
        Reply('{"score": 0.5}', delay_s=30),
    ],
    ids=["500", "429", "dropped", "no JSON", "no choices", "no text", "no score", "cut off", "hangs"],
)
def test_what_may_pass_is_tried_again_and_costs_one_sample_when_it_does_not(bad: Reply) -> None:
    def answer(request: Request) -> Reply:
        if "always" in request.text or ("once" in request.text and len(at_first) < 1):
            at_first.append(request)
            return bad
        return GOOD

    at_first: list[Request] = []
    with FakeEndpoint(answer).open() as endpoint:
        judge = Judge(**settings(endpoint, request_timeout=0.3))
        [once] = scored(judge, ["once"])
        rollouts = scored(judge, ["always", "fine"])
    assert (once.reward, once.failures, len(at_first)) == (0.75, {}, 1 + 3)  # then three attempts at "always"
    assert [(rollout.reward, rollout.failures) for rollout in rollouts] == [(0.0, {"judge": "error"}), (0.75, {})]


def test_the_total_limit_counts_as_a_timeout() -> None:
    with FakeEndpoint(one_after_another(GOOD, Reply(delay_s=30))).open() as endpoint:
        judge = Judge(**settings(endpoint, timeout=0.3))
        assert scored(judge, ["a"])[0].failures == {}
        [rollout] = scored(judge, ["b"])
    assert (rollout.reward, rollout.failures) == (0.0, {"judge": "timeout"})


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_holds_back_every_call(as_date: bool) -> None:
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3)
    value = email.utils.format_datetime(when, usegmt=True) if as_date else "1"
    with FakeEndpoint(
        one_after_another(GOOD, Reply(status=429, headers={"Retry-After": value}), GOOD)
    ).open() as endpoint:
        judge = Judge(**settings(endpoint, concurrency=1))
        scored(judge, ["a"])
        rollouts = scored(judge, ["b", "c"])
    assert [rollout.failures for rollout in rollouts] == [{}, {}]
    first, refused, *later = (request.at for request in endpoint.requests)
    assert len(later) == 2 and later[0] - refused >= 0.99
    assert refused >= first


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(status=401, body='{"error": {"message": "bad key"}}'), "answered 401: bad key; check api_key_env"),
        (Reply(status=404, body='{"message": "no model m"}'), "answered 404: no model m; check base_url and model"),
        (
            Reply(status=429, body='{"error": {"message": "pay", "code": "insufficient_quota"}}'),
            "answered 429: pay; check base_url and model",
        ),
        (Reply(status=400, body='{"error": {"message": "temperature"}}'), "temperature; the first request was refused"),
        (Reply(status=301, headers={"Location": "/"}, body=""), "answered 301: .*; the first request was refused"),
        (Reply(status=503, body="starting"), "3 attempts, the last: .* 503: starting; nothing was ever answered"),
        (Reply(body="<html>"), "is no chat completion: '<html>'; nothing was ever answered"),
    ],
)
def test_what_the_user_must_put_right_is_raised_in_one_line(reply: Reply, message: str) -> None:
    with FakeEndpoint(lambda _: reply).open() as endpoint, pytest.raises(ConfigError, match=message) as raised:
        scored(Judge(**settings(endpoint)), ["a"])
    assert "\n" not in str(raised.value) and endpoint.base_url in str(raised.value)
    assert len(endpoint.requests) == (3 if reply.status in (503, 200) else 1)


def test_a_wrong_address_is_raised_at_once() -> None:
    with FakeEndpoint(lambda _: GOOD).open() as endpoint:
        pass  # closed again: nobody listens there
    with pytest.raises(ConfigError, match=r"cannot be reached .*: check base_url"):
        scored(Judge(**settings(endpoint, retries=1000)), ["a"])


@pytest.mark.parametrize("first", [Reply(status=400, body='{"message": "maximum context length is 10"}'), GOOD])
def test_one_text_that_is_refused_costs_one_sample(first: Reply) -> None:
    refusal = Reply(status=400, body='{"message": "maximum context length is 10"}')

    def answer(request: Request) -> Reply:
        return refusal if "long" in request.text else first if "first" in request.text else GOOD

    with FakeEndpoint(answer).open() as endpoint:
        judge = Judge(**settings(endpoint))
        scored(judge, ["first"])
        rollouts = scored(judge, ["long", "short"])
    assert [(rollout.reward, rollout.failures) for rollout in rollouts] == [(0.0, {"judge": "error"}), (0.75, {})]
    assert len(endpoint.requests) == 3  # a refusal is not tried again


def test_an_endpoint_that_goes_away_later_costs_samples_and_not_the_run() -> None:
    with FakeEndpoint(lambda _: GOOD).open() as endpoint:
        judge = Judge(**settings(endpoint, on_error="skip"))
        scored(judge, ["a"])
    [rollout] = scored(judge, ["b"])
    assert (rollout.rewards, rollout.failures) == ({"judge": None}, {"judge": "error"})


def test_the_key_comes_from_the_environment_and_is_not_kept(
    good: FakeEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-9")
    judge = Judge(**settings(good, api_key_env="JUDGE_KEY"))
    scored(judge)
    assert good.requests[0].headers["authorization"] == "Bearer secret-9"
    assert b"secret-9" not in cloudpickle.dumps(judge) and "secret-9" not in repr(judge)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"api_key": "sk-1"}, "unexpected keyword argument 'api_key'"),
        ({"api_key_env": "sk-1"}, "the name of an environment variable, not the key"),
        ({"api_key_env": "NO_SUCH_KEY_HERE"}, "NO_SUCH_KEY_HERE .* is not set"),
        ({"base_url": "localhost:8000"}, "is no address"),
        ({"scale": [1, 1]}, "scale is"),
        ({"scale": [0]}, "scale"),
        ({"parse": "xml"}, "parse is one of json, tag, number"),
        ({"template": "{answer}"}, "where the {completion} goes"),
        ({"columns": ["hint"]}, "the template has no {hint}"),
        ({"retries": -1}, "retries"),
        ({"timeout": 0}, "timeout"),
        ({"on_error": "ignore"}, "on_error is one of"),
    ],
)
def test_wrong_settings_are_refused_when_the_run_is_set_up(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, RewardError), match=message) as raised:
        resolve("judge", settings={"model": "m", "base_url": "http://localhost/v1", **wrong})
    assert "sk-1" not in str(raised.value)


def test_equal_texts_are_asked_about_once_unless_told_otherwise(good: FakeEndpoint) -> None:
    rubric = Rubric([Judge(**settings(good)), Judge(**settings(good, name="again", cache=False))])
    group = (Prompt("p", "2+2?", {}), [Completion((), (), "4", "stop", 0)])
    for _ in range(3):
        asyncio.run(rubric.score([group]))
    assert len(good.requests) == 1 + 3


def test_calls_of_a_loop_share_connections_and_keep_to_the_concurrency() -> None:
    with FakeEndpoint(lambda _: dataclasses.replace(GOOD, delay_s=0.02)).open() as endpoint:
        judge = Judge(**settings(endpoint, concurrency=4, cache=False))
        for _ in range(2):  # each in an event loop of its own, and full: both wait for room
            assert [rollout.reward for rollout in scored(judge, ["x"] * 24)] == [0.75] * 24
    assert endpoint.most_at_once == 4
    assert endpoint.connections <= 4 * 2 and len(endpoint.requests) == 48


def test_the_explanation_is_the_judges_reply() -> None:
    said = 'Right, but rude. {"score": 0.5}'
    with FakeEndpoint(lambda _: Reply(said)).open() as endpoint:
        judge = Judge(**settings(endpoint))
        scored(judge)
        explain = explanation_of(judge)
    assert explain is not None and explain() == said


def test_a_judge_survives_pickling(good: FakeEndpoint) -> None:
    judge = cloudpickle.loads(cloudpickle.dumps(Judge(**settings(good, scale=(0, 3)))))
    assert scored(judge)[0].reward == 0.25
    assert json.loads(json.dumps(good.requests[0].body))["temperature"] == 0.0
