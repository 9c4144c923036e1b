"""A judge behind any OpenAI-compatible endpoint: OpenAI, vLLM, llama.cpp, `transformers serve`.

Greedy (temperature 0), several requests at a time. An answer without a conclusion is asked for its last line once more;
without one again, the case counts as undecided. Every reply is kept on disk under a hash of all that was sent.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from clearhead.data.cache import cache_dir
from clearhead.evals.faithfulness.judges.base import Case, Judge, JudgeConfig, JudgeError, Judgement
from clearhead.evals.faithfulness.judges.prompt import AGAIN, conclusion, judge_prompt
from clearhead.evals.faithfulness.judges.replies import ReplyStore
from clearhead.evals.faithfulness.judges.transport import (
    JudgeReply,
    RefusedError,
    Transport,
    reply_of,
    without_secrets,
)
from clearhead.runs.secrets import secret_in

Message = dict[str, str]
TEMPLATE = 64
"""Tokens that an endpoint's chat template may add to the messages, at most."""


class EndpointConfig(JudgeConfig):
    """model: its name at the endpoint. base_url: up to and with `/v1`.

    api_key_env: environment variable that holds the key; "" for an endpoint without keys.
    max_tokens: of a reply. extra: further fields of the request, over ours (`{max_completion_tokens = 600}`); a field
        that is the empty string is left out (`{max_tokens = ""}`).
    timeout: seconds of one attempt. retries, backoff: see `transport`. concurrency: requests at a time.
    price_input, price_output: per million tokens, in any currency. budget: in the same; no request is sent that might
        exceed it. cache: file of the replies (default: judges/MODEL.jsonl in the cache directory).
    """

    model: str = Field(min_length=1)
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str = "OPENAI_API_KEY"
    max_tokens: int = Field(default=512, ge=1)
    extra: dict[str, Any] = Field(default={})
    timeout: float = Field(default=120.0, gt=0, le=86400)
    retries: int = Field(default=5, ge=0, le=1000)
    backoff: float = Field(default=1.0, ge=0, le=3600)
    concurrency: int = Field(default=4, ge=1, le=1000)
    price_input: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    price_output: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    budget: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    cache: str | None = None

    @field_validator("extra")
    @classmethod
    def _sendable(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"it cannot be sent as JSON ({error})") from None
        for name in ("max_tokens", "max_completion_tokens"):
            most = value.get(name, "")
            if most not in ("", None) and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
                raise ValueError(
                    f"{name} is a number of tokens from 1 on, or the empty string to leave it out"
                )
        return value

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("price_input and price_output go together, per million tokens")
        if self.budget is not None and self.price_input is None:
            raise ValueError("a budget needs price_input and price_output")
        return self


class Endpoint(Judge[EndpointConfig]):
    name = "openai"
    Config = EndpointConfig

    def __init__(self, config: EndpointConfig) -> None:
        super().__init__(config)
        self.lock = threading.Lock()
        self.requests = self.cached = self.prompt_tokens = self.completion_tokens = 0
        self.reserved = 0.0

    def prepare(self) -> None:
        """Reads the key and opens the store. Raises JudgeError for a key that is not set, or is in the address."""
        if without_secrets(self.config.base_url) != self.config.base_url.strip():
            raise JudgeError(
                f"judge_options.base_url ({without_secrets(self.config.base_url)}) holds a password or a query, which "
                "would be written down with the results: put the key into the variable of judge_options.api_key_env"
            )
        if found := secret_in(self.config.model_dump()):
            raise JudgeError(f"{found}: put the key into the variable of judge_options.api_key_env")
        self._key()
        self.store = self._open_store()

    def _key(self) -> str:
        variable = self.config.api_key_env
        if not variable:
            return ""
        # What has small letters may be the key itself, put where its variable's name belongs.
        shown = variable if variable == variable.upper() else "that judge_options.api_key_env names"
        key = os.environ.get(variable, "").strip()
        if not key:
            raise JudgeError(
                f"the judge's key is read from the environment variable {shown}, which is not set: export it, or "
                'set judge_options.api_key_env = "" for an endpoint without keys'
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise JudgeError(
                f"the judge's key in the environment variable {shown} holds a space, a line break or "
                "another character that no header may hold: export the key alone"
            )
        return key

    def _open_store(self) -> ReplyStore:
        name = (
            "".join(c if c.isalnum() or c in "-_." else "-" for c in self.config.model).strip(".") or "judge"
        )
        path = Path(self.config.cache).expanduser() if self.config.cache else None
        return ReplyStore(path or cache_dir() / "judges" / f"{name}.jsonl")

    def judge(self, cases: Sequence[Case]) -> Iterator[tuple[int, Judgement]]:
        c = self.config
        self.transport = Transport(
            c.base_url, self._key(), timeout=c.timeout, retries=c.retries, backoff=c.backoff,
            connections=c.concurrency,
        )  # fmt: skip
        pool = ThreadPoolExecutor(c.concurrency)
        running: dict[Future[Judgement], int] = {}
        todo = iter(enumerate(cases))
        failed: Exception | None = None
        try:
            while True:
                # Only as many are begun as run at a time: after an error none is paid for nothing.
                while failed is None and len(running) < c.concurrency and (one := next(todo, None)):
                    running[pool.submit(self._decide, one[1])] = one[0]
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(done)
                    error = done.exception()
                    if error is None:
                        yield index, done.result()
                    elif isinstance(error, Exception):
                        failed = failed or error
                    else:
                        raise error
            if failed is not None:
                raise failed
        finally:
            self.transport.close()
            pool.shutdown(wait=True, cancel_futures=True)

    def _decide(self, case: Case) -> Judgement:
        messages: list[Message] = [{"role": "user", "content": judge_prompt(case)}]
        try:
            reply = self._ask(messages)
            found = conclusion(reply.text)
            if found is None:
                again = [
                    *messages, {"role": "assistant", "content": reply.text or "-"}, {"role": "user", "content": AGAIN}
                ]  # fmt: skip
                second = self._ask(again)
                found = conclusion(second.text)
                if found is None:
                    cut = ", cut at max_tokens" if second.finish == "length" else ""
                    said = " ".join(second.text.split())[:120]
                    return Judgement(None, f"no conclusion, asked twice{cut}: {said!r}")
        except RefusedError as error:
            return Judgement(None, str(error))
        return Judgement(found, reply.text)

    def _ask(self, messages: list[Message]) -> JudgeReply:
        c = self.config
        body = {
            "model": c.model, "messages": messages, "temperature": 0, "max_tokens": c.max_tokens, **c.extra
        }  # fmt: skip
        body = {name: value for name, value in body.items() if value != ""}
        key = ReplyStore.key({"url": self.transport.url, **body})
        kept = self.store.get(key)
        reply = None if kept is None else reply_of(kept)
        if reply is not None:
            with self.lock:
                self.cached += 1
            return reply
        most = self._reserve(messages)
        try:
            reply = self.transport.send(body)
        except BaseException:
            with self.lock:
                self.reserved -= most
            raise
        with self.lock:
            # Together: in between, the money would be neither set aside nor spent.
            self.reserved -= most
            self.requests += 1
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens
        self.store.put(key, asdict(reply))
        return reply

    def _reserve(self, messages: Sequence[Message]) -> float:
        """What a request may cost at most, set aside while it runs. JudgeError where that would exceed the budget."""
        c = self.config
        if c.price_input is None or c.price_output is None:
            return 0.0
        # No tokenizer makes more tokens of a text than it has bytes.
        size = sum(len(message["content"].encode()) for message in messages) + TEMPLATE
        # What `extra` names is what is sent.
        longest = max(
            c.max_tokens, *(int(c.extra.get(name) or 0) for name in ("max_tokens", "max_completion_tokens"))
        )
        most = (size * c.price_input + longest * c.price_output) / 1e6
        with self.lock:
            spent = self._cost() or 0.0
            if c.budget is not None and spent + self.reserved + most > c.budget:
                raise JudgeError(
                    f"the next request may cost {most:.4f} and could exceed judge_options.budget = {c.budget:g}; "
                    f"{self._spent(spent)} What was judged is kept: the same command with a larger budget goes on"
                )
            self.reserved += most
        return most

    def _cost(self) -> float | None:
        c = self.config
        if c.price_input is None or c.price_output is None:
            return None
        return (self.prompt_tokens * c.price_input + self.completion_tokens * c.price_output) / 1e6

    def usage(self) -> dict[str, Any]:
        with self.lock:
            return {
                "requests": self.requests,
                "from_cache": self.cached,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "cost": self._cost(),
            }

    def spent(self) -> str:
        with self.lock:
            return self._spent(self._cost())

    def _spent(self, cost: float | None) -> str:
        price = "no price given" if cost is None else f"cost {cost:.4f}"
        return (
            f"{self.requests} requests, {self.prompt_tokens:,} + {self.completion_tokens:,} tokens, {price}; "
            f"{self.cached} replies from the cache."
        )

    def described(self) -> str:
        return f"{self.config.model} at {without_secrets(self.config.base_url)}"
