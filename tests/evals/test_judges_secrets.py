"""No secret in any text, and no reply that stops a judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from clearhead.evals.faithfulness.judges.base import JudgeError, make_judge
from clearhead.evals.faithfulness.judges.replies import ReplyStore
from clearhead.evals.faithfulness.judges.transport import Transport, error_of, parsed, without_secrets
from tests.evals.judging import SKY

DEEP = "[" * 100_000


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk-one\rX: y", "sk one", "sk-onё", "sk-\x00one"])
def test_a_key_that_no_header_may_hold_is_refused_without_being_shown(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An environment holds no NUL, so the settings are handed the key itself.
    monkeypatch.setattr("os.environ", {"JUDGE_KEY": key})
    judge = make_judge("openai", {"model": "m", "api_key_env": "JUDGE_KEY", "cache": str(tmp_path / "c")})
    with pytest.raises(JudgeError, match="JUDGE_KEY") as caught:
        judge.prepare()
    assert "one" not in str(caught.value).replace("another", "").replace("alone", "")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@judge.example/v1", "https://judge.example/v1"),
        ("http://judge.example:8000/v1?api_key=secret", "http://judge.example:8000/v1"),
        ("http://secret@[::1]:8000/v1#x", "http://[::1]:8000/v1"),
        ("http://judge.example/v1", "http://judge.example/v1"),
    ],
)
def test_an_address_is_shown_without_its_secrets(url: str, shown: str, tmp_path: Path) -> None:
    assert without_secrets(url) == shown
    options = {"model": "m", "api_key_env": "", "base_url": url, "cache": str(tmp_path / "c")}
    judge = make_judge("openai", options)
    assert "secret" not in judge.described()
    if url != shown:
        with pytest.raises(JudgeError, match="holds a password or a query") as caught:
            judge.prepare()
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        DEEP,
        f'{{"choices": {DEEP}',
        '{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e999}}',
        f'{{"choices": [{{"message": {{"content": "x"}}}}], "usage": {{"prompt_tokens": {"9" * 5000}}}}}',
        "[]",
        "null",
        '{"choices": {}}',
        "\ufeff",
    ],
)
def test_an_answer_of_any_shape_is_no_crash(body: str) -> None:
    response = httpx2.Response(200, text=body)
    assert parsed(response) is None
    assert isinstance(error_of(response), str)


def test_a_damaged_cache_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text(f'{DEEP}\n{{"key": "a", "reply": {{"text": "x"}}}}\n')
    assert ReplyStore(path).get("a") == {"text": "x"}


@pytest.mark.parametrize("said", ["sk-sec\\ret", "the key 'sk-sec\\\\ret'", '{"key": "sk-sec\\\\ret"}'])
def test_what_a_server_repeats_is_cleaned_in_every_spelling(said: str) -> None:
    transport = Transport("http://x/v1", "sk-sec\\ret", timeout=1, retries=0, backoff=0, connections=1)
    assert "sec" not in transport._clean(said)
    transport.close()


def test_a_broken_address_is_one_sentence(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": "m", "api_key_env": "", "retries": 0, "cache": str(tmp_path / "c")}
    for url in ("http://[::1", "http://exa mple/v1", "http://x:99999999/v1"):
        with pytest.raises((JudgeError, ValueError)) as caught:
            judge = make_judge("openai", {**options, "base_url": url})
            judge.prepare()
            list(judge.judge([replace(SKY)]))
        assert "\n" not in str(caught.value)
