"""Judges against hostile settings, endpoints and files: no secret leaves, nothing crashes, nothing hangs."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from clearhead.evals.faithfulness.hallucination.evaluation import HallucinationConfig
from clearhead.evals.faithfulness.judges import transport
from clearhead.evals.faithfulness.judges.base import JudgeError, make_judge
from clearhead.evals.faithfulness.judges.prompt import conclusion
from clearhead.evals.faithfulness.judges.replies import ReplyStore
from clearhead.evals.faithfulness.judges.transport import Transport, parsed, reply_of, retry_after
from clearhead.evals.runner import checked, parse_options
from clearhead.runs.recipe import RecipeError
from clearhead.runs.recipe_io import validate
from clearhead.runs.secrets import line_of, redacted, secret_in
from tests.evals.judging import SKY, completion, endpoint

SECRET = "sk-s3cr3t/word+1"
OPTIONS: list[dict[str, Any]] = [
    {"base_url": f"https://me:{SECRET.replace('/', '')}@x.example/v1"},
    {"base_url": f"https://x.example/v1?api-key={SECRET}"},
    {"extra": {"api_key": SECRET}},
    {"extra": {"headers": [{"Authorization": f"Bearer {SECRET}"}]}},
    {"api_key_env": SECRET},
    {"proxy": {"password": SECRET}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_secret_among_the_options_is_refused_before_it_is_written_down(options: dict[str, Any]) -> None:
    given = {"data": ["x.jsonl"], "judge": "openai", "judge_options": {"model": "m", **options}}
    with pytest.raises(ValueError, match="judge_options") as one:
        checked("hallucination", given)
    with pytest.raises(RecipeError, match="judge_options") as two:
        validate(HallucinationConfig, given, "recipe.toml", ("evaluate", "hallucination"), {})
    for said in (str(one.value), str(two.value)):
        assert "s3cr3t" not in said and "environment variable" in said and "\n" not in said


def test_what_else_is_wrong_is_told_without_secrets() -> None:
    given = {"judge": "openai", "judge_options": {"extra": {"api_key": SECRET}}}
    with pytest.raises(ValueError, match="data") as caught:
        checked("hallucination", given)
    assert "s3cr3t" not in str(caught.value)
    for text in (f"judge_options.base_url https://u:{SECRET[:5]}s3cr3t@x", f"password={SECRET}"):
        with pytest.raises(ValueError, match="--set") as caught:
            parse_options([text], ["hallucination", "passkey"])
        assert "s3cr3t" not in str(caught.value)


def test_options_without_secrets_are_fine() -> None:
    fine = {
        "model": "m", "api_key_env": "JUDGE_KEY", "base_url": "http://[::1]:8000/v1", "max_tokens": 5,
        "extra": {"max_completion_tokens": 600, "seed": 1, "logit_bias": {"50256": -100}, "key": ""},
    }  # fmt: skip
    assert secret_in(fine) is None
    HallucinationConfig(data=["x"], judge="openai", judge_options=fine)


@pytest.mark.parametrize(
    "said",
    [
        f"no such key {SECRET}",
        f"Bearer {SECRET}\x1b[31m",
        "https://x/v1?k=sk-s3cr3t%2Fword%2B1",
        f"proxy http://user:{SECRET[:8]}@proxy:80 refused",
        f'{{"api_key": "{SECRET[:8]}"}}',
        f"Authorization: Bearer {SECRET[:8]}",
    ],
)
def test_what_is_said_comes_without_secrets_or_control_characters(said: str) -> None:
    line = line_of(said, SECRET)
    assert "s3cr3t" not in line and line.isprintable() and "***" in line


def test_words_that_are_no_secrets_stay() -> None:
    text = "passkey.samples: input should be greater than 0; the key 'x' is unknown; max_tokens = 5; see http://x/v1"
    assert redacted(text) == text


def test_a_key_that_an_endpoint_repeats_is_kept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    cache = tmp_path / "replies.jsonl"
    with endpoint(lambda number, body: completion(f"You are {SECRET} \ud800.\n**Conclusion: True**")) as fake:
        options = {"model": "m", "base_url": fake.url, "api_key_env": "JUDGE_KEY", "cache": str(cache)}
        judge = make_judge("openai", options)
        judge.prepare()
        ((_, verdict),) = judge.judge([SKY])
    assert verdict.faithful and "s3cr3t" not in verdict.reason + cache.read_text()
    verdict.reason.encode()


def test_a_name_of_a_variable_that_may_be_a_key_is_not_shown(tmp_path: Path) -> None:
    judge = make_judge("openai", {"model": "m", "api_key_env": "sk_s3cr3t", "cache": str(tmp_path / "c")})
    with pytest.raises(JudgeError, match="which is not set") as caught:
        judge.prepare()
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"price_input": math.inf, "price_output": 1.0}, "price_input"),
        ({"timeout": math.inf}, "timeout"),
        ({"backoff": 1e30}, "backoff"),
        ({"extra": {"temperature": math.nan}}, "extra.*sent as JSON"),
        ({"extra": {"since": time}}, "extra.*sent as JSON"),
        ({"extra": {"max_completion_tokens": "many"}}, "max_completion_tokens"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        make_judge("openai", {"model": "m", **settings})
    assert "\n" not in str(caught.value)


def sender(url: str, **settings: Any) -> Transport:
    return Transport(url, "", **{"timeout": 5.0, "retries": 0, "backoff": 0.0, "connections": 1, **settings})


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": -5}, {"completion_tokens": 10**30}, {"prompt_tokens": "x"}, [1]]
)
def test_tokens_that_cannot_be_are_no_reply(usage: Any) -> None:
    body = {"choices": [{"message": {"content": "x"}}], "usage": usage}
    assert parsed(httpx2.Response(200, json=body)) is None


def test_an_answer_without_end_or_of_no_speed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MOST_BYTES", 2**10)
    with endpoint(lambda number, body: (200, "x" * 2**12, {})) as fake:
        reader = sender(fake.url)
        with pytest.raises(JudgeError, match="answers more than"):
            reader.send({})
        reader.close()

    # A byte now and then keeps every single read within its time.
    class Dripping(httpx2.SyncByteStream):
        def __iter__(self) -> Any:
            for _ in range(100):
                time.sleep(0.02)
                yield b" "

    slow = sender("http://x.example/v1", timeout=0.1)
    slow.client = httpx2.Client(
        transport=httpx2.MockTransport(lambda request: httpx2.Response(200, stream=Dripping()))
    )
    with pytest.raises(JudgeError, match=r"did not answer within 0\.1 s"):
        slow.send({})
    slow.close()


@pytest.mark.parametrize(
    "headers", [{"Content-Encoding": "gzip"}, {"Content-Type": "text/plain; charset=nonsense"}]
)
def test_an_answer_that_cannot_be_decoded_is_one_sentence(headers: dict[str, str]) -> None:
    with endpoint(lambda number, body: (200, "not compressed at all", headers)) as fake:
        reader = sender(fake.url)
        with pytest.raises(JudgeError, match="check judge_options"):
            reader.send({})
        reader.close()


def test_a_reply_of_colons_takes_no_time() -> None:
    started = time.monotonic()
    assert conclusion("conclusion" + ":" * 200_000 + " x") is None
    assert conclusion("**Conclusion**: **True**") is True
    assert time.monotonic() - started < 5


def test_waits_that_no_clock_has_are_none() -> None:
    assert retry_after("nan") == 0.0
    assert retry_after("Mon, 01 Jan 99999999999 00:00:00 GMT") is None


def test_a_cache_of_other_fields_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fields in ({}, {"text": 5}, {"text": "x", "prompt_tokens": "1"}, {"text": "x", "finish": None}):
        assert reply_of(fields) is None
    kept = reply_of({"text": "x", "prompt_tokens": 1, "completion_tokens": 2, "finish": "stop", "more": 1})
    assert kept is not None and kept.completion_tokens == 2
    store = ReplyStore(tmp_path / "replies.jsonl")
    store.path = tmp_path
    with pytest.raises(JudgeError, match=re.escape(f"cannot be kept in '{tmp_path}'")):
        store.put("a", {"text": "x"})
    assert json.dumps(store.get("a")) == '{"text": "x"}'
