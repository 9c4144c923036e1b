"""The judge behind an endpoint: its protocol, patience, thrift and errors, over real HTTP."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clearhead.evals.faithfulness.judges.base import Case, JudgeError, Judgement, make_judge
from clearhead.evals.faithfulness.judges.endpoint import Endpoint
from clearhead.evals.faithfulness.judges.prompt import conclusion, judge_prompt
from clearhead.evals.faithfulness.judges.transport import retry_after
from tests.evals.judging import SKY, completion, endpoint

TRUE, FALSE = completion("It is blue there.\n**Conclusion: True**"), completion("No.\n**Conclusion: False**")
KEY = "sk-very-secret-1234"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    return {
        "model": "judge-1", "api_key_env": "JUDGE_KEY", "backoff": 0.01, "timeout": 5.0,
        "cache": str(tmp_path / "replies.jsonl"),
    }  # fmt: skip


def made(url: str, settings: dict[str, Any], **more: Any) -> Endpoint:
    judge = make_judge("openai", {**settings, "base_url": url, **more})
    assert isinstance(judge, Endpoint)
    judge.prepare()
    return judge


def verdicts(judge: Endpoint, cases: list[Case]) -> list[Judgement]:
    found = dict(judge.judge(cases))
    return [found[i] for i in range(len(cases))]


def cases(count: int) -> list[Case]:
    return [replace(SKY, proposed=f"It is blue {i}") for i in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**Conclusion: True**", True),
        ("**conclusion**: **FALSE**.", False),
        ("Conclusion: True or not?\n\n**Conclusion: False**\n", False),
        ("**Conclusion:**\nTrue", True),
        ("It is true.", None),
        ("**Conclusion: Truely**", None),
        ("Conclusion: neither", None),
        ("", None),
    ],
)
def test_the_last_conclusion_counts(text: str, expected: bool | None) -> None:
    assert conclusion(text) is expected


def test_the_prompt_shows_every_field_and_asks_for_the_last_line() -> None:
    text = judge_prompt(SKY)
    assert "#Document#: The sky is blue." in text and "#Question#: What is the sky?" in text
    assert (
        "#Ground Truth Answers (any of them is right)#: blue" in text
        and "#Proposed Answer#: It is blue" in text
    )
    assert text.endswith("**Conclusion: True**\nor\n**Conclusion: False**") and "Problematic Spans" in text
    summary = judge_prompt(Case("summarisation", "A text.", ("Short.",), "Shorter."), explain=False)
    assert "#Ground Truth Summary#: Short." in summary and "#Proposed Summary#: Shorter." in summary
    assert "Question" not in summary and "Problematic" not in summary


def test_verdicts_usage_and_the_request(settings: dict[str, Any]) -> None:
    def reply(number: int, body: dict[str, Any]) -> Any:
        return FALSE if "blue 1" in body["messages"][0]["content"] else TRUE

    with endpoint(reply) as fake:
        judge = made(
            fake.url, settings, price_input=2.0, price_output=8.0, extra={"seed": 5, "max_tokens": ""}
        )
        found = verdicts(judge, cases(3))
    assert [verdict.faithful for verdict in found] == [True, False, True]
    assert found[1].reason.startswith("No.")
    assert fake.keys == [f"Bearer {KEY}"] * 3 and fake.asked[0]["path"] == "/v1/chat/completions"
    assert (
        fake.asked[0]["temperature"] == 0 and fake.asked[0]["seed"] == 5 and "max_tokens" not in fake.asked[0]
    )
    # 3 requests of 100 + 10 tokens at 2 and 8 per million.
    assert judge.usage() == {
        "requests": 3, "from_cache": 0, "prompt_tokens": 300, "completion_tokens": 30,
        "cost": pytest.approx(3 * (100 * 2 + 10 * 8) / 1e6),
    }  # fmt: skip
    assert "3 requests, 300 + 30 tokens, cost 0.0008" in judge.spent()
    assert KEY not in judge.spent() + judge.described() + Path(settings["cache"]).read_text()


def test_a_repeated_or_interrupted_run_pays_nothing_twice(settings: dict[str, Any]) -> None:
    def reply(number: int, body: dict[str, Any]) -> Any:
        return TRUE if number < 4 else (401, "", {})

    with endpoint(reply) as fake:
        with pytest.raises(JudgeError, match="401"):
            verdicts(made(fake.url, settings, concurrency=1), cases(6))
        assert len(fake.asked) == 5, "nothing is sent after an error"
        store = Path(settings["cache"])
        # A killed process may leave half a line.
        store.write_text(store.read_text() + '{"key": "abc", "re')
        judge = made(fake.url, settings)
        assert all(verdict.faithful for verdict in verdicts(judge, cases(4))) and len(fake.asked) == 5
        assert judge.usage()["from_cache"] == 4 and judge.usage()["cost"] is None
        assert "no price given; 4 replies from the cache" in judge.spent()
        # Another model is another question.
        with pytest.raises(JudgeError):
            verdicts(made(fake.url, {**settings, "model": "judge-2"}), cases(1))
    assert [
        json.loads(line)["reply"]["text"][:2]
        for line in store.read_text().splitlines()
        if '"abc"' not in line
    ] == ["It"] * 4


def test_what_passes_is_waited_for(settings: dict[str, Any]) -> None:
    script = [
        (429, "slow", {"Retry-After": "0.2"}),
        (503, "", {}),
        (500, "oops", {}),
        (200, "<html>", {}),
        TRUE,
    ]
    with endpoint(lambda number, body: script[number]) as fake:
        assert verdicts(made(fake.url, settings), [SKY])[0].faithful is True
    waits = [b - a for a, b in zip(fake.times, fake.times[1:], strict=False)]
    assert waits[0] >= 0.2 and all(wait < 0.2 for wait in waits[1:]), "Retry-After is heeded"
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0 and retry_after("soon") is None


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_no_is_not_asked_again(status: int, settings: dict[str, Any]) -> None:
    body = json.dumps({"error": {"message": f"bad key {KEY}"}})
    with endpoint(lambda number, _: (status, body, {})) as fake, pytest.raises(JudgeError) as error:
        verdicts(made(fake.url, settings), [SKY])
    assert len(fake.asked) == 1
    assert f"answers {status} (bad key ***)" in str(error.value) and KEY not in str(error.value)
    hint = {401: "check the key", 403: "check the key", 404: "judge_options.model"}.get(status, "")
    assert hint in str(error.value)


def test_one_case_that_the_endpoint_refuses_is_undecided(settings: dict[str, Any]) -> None:
    def reply(number: int, body: dict[str, Any]) -> Any:
        long = "blue 1" in body["messages"][0]["content"]
        return (400, json.dumps({"error": {"message": "too long"}}), {}) if long else TRUE

    with endpoint(reply) as fake:
        found = verdicts(made(fake.url, settings), cases(3))
    assert [verdict.faithful for verdict in found] == [True, None, True]
    assert found[1].reason == "the judge answers 400 (too long)" and len(fake.asked) == 3


def test_nonsense_is_asked_for_its_last_line_once_and_then_undecided(settings: dict[str, Any]) -> None:
    def reply(number: int, body: dict[str, Any]) -> Any:
        last = body["messages"][-1]["content"]
        if "blue 0" in body["messages"][0]["content"]:
            return completion("banana") if len(body["messages"]) == 1 else FALSE
        return completion("", finish="length") if "no conclusion" in last else completion(None)

    with endpoint(reply) as fake:
        judge = made(fake.url, settings)
        found = verdicts(judge, cases(2))
        assert [verdict.faithful for verdict in found] == [False, None]
        assert "no conclusion, asked twice, cut at max_tokens" in found[1].reason
        assert len(fake.asked) == 4 and {len(body["messages"]) for body in fake.asked} == {1, 3}
        assert verdicts(judge, cases(2)) == found and len(fake.asked) == 4, "nonsense is kept too"


def test_a_judge_that_times_out(settings: dict[str, Any]) -> None:
    with endpoint(lambda number, body: TRUE, delay=30) as fake, pytest.raises(JudgeError) as error:
        verdicts(made(fake.url, settings, timeout=0.2, retries=1), [SKY])
    assert "did not answer within 0.2 s: raise judge_options.timeout" in str(error.value)
    assert "tried 2 times" in str(error.value) and len(fake.asked) == 2


def test_an_endpoint_that_is_not_there(settings: dict[str, Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(JudgeError, match=r"cannot be reached .* check judge_options\.base_url"):
        verdicts(made(url, settings, retries=1), [SKY])
    with pytest.raises(JudgeError, match="is not an http address"):
        verdicts(made("localhost:8000/v1", settings), [SKY])


def test_what_is_no_completion_at_all(settings: dict[str, Any]) -> None:
    for body in ("{", "[]", '{"choices": []}', '{"choices": [{"message": "x"}]}'):
        with (
            endpoint(lambda number, _, body=body: (200, body, {})) as fake,
            pytest.raises(JudgeError, match="something that is no chat completion"),
        ):
            verdicts(made(fake.url, settings, retries=1), [SKY])
    with (
        endpoint(lambda number, _: (429, "", {"Retry-After": "3600"})) as fake,
        pytest.raises(JudgeError, match="asks to wait 3600 s"),
    ):
        verdicts(made(fake.url, settings), [SKY])
    assert len(fake.asked) == 1


def test_requests_run_side_by_side_and_no_more_than_asked(settings: dict[str, Any]) -> None:
    with endpoint(lambda number, body: TRUE, delay=0.1) as fake:
        verdicts(made(fake.url, settings, concurrency=3), cases(9))
    assert fake.at_once == 3


def test_a_budget_is_never_exceeded(settings: dict[str, Any]) -> None:
    prices = {"price_input": 10.0, "price_output": 20.0, "max_tokens": 100}
    size = len(judge_prompt(cases(1)[0]).encode()) + 64
    most = (size * 10 + 100 * 20) / 1e6
    # Every reply costs as much as it may: the budget holds three of them and a half.
    used = completion("**Conclusion: True**", (size, 100))
    with endpoint(lambda number, body: used) as fake:
        judge = made(fake.url, settings, **prices, budget=3.5 * most, concurrency=4)
        with pytest.raises(JudgeError, match=r"could exceed judge_options\.budget"):
            verdicts(judge, cases(8))
        assert len(fake.asked) == 3 and judge.usage()["cost"] == pytest.approx(3 * most)
        richer = made(fake.url, settings, **prices, budget=6 * most)
        assert len(verdicts(richer, cases(8))) == 8 and len(fake.asked) == 8, "three were paid before"


def test_options_and_keys_that_cannot_be(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown judge 'opnai': did you mean 'openai'"):
        make_judge("opnai", {})
    with pytest.raises(ValueError, match="no option 'modle': did you mean 'model'"):
        make_judge("openai", {**settings, "modle": "x"})
    with pytest.raises(ValueError, match="a budget needs price_input and price_output"):
        make_judge("openai", {**settings, "budget": 1.0})
    with pytest.raises(ValueError, match="go together"):
        make_judge("openai", {**settings, "price_input": 1.0})
    with pytest.raises(ValueError, match=r"judge_options\.model"):
        make_judge("openai", {})
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(JudgeError, match="environment variable JUDGE_KEY, which is not set"):
        make_judge("openai", settings).prepare()
    with endpoint(lambda number, body: TRUE) as fake:
        assert verdicts(made(fake.url, {**settings, "api_key_env": ""}), [SKY])[0].faithful
        assert fake.keys == [None]
    blocked = Path(settings["cache"])
    with pytest.raises(JudgeError, match=r"cannot be kept in .* set judge_options\.cache"):
        make_judge("openai", {**settings, "api_key_env": "", "cache": str(blocked / "below")}).prepare()
