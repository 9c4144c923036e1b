"""One request to an OpenAI-compatible endpoint: patience with what passes, one clear sentence for what does not."""

from __future__ import annotations

import email.utils
import json
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from clearhead.extras import need

need("the judge 'openai'", "judges")

import httpx2

from clearhead.evals.faithfulness.judges.base import JudgeError
from clearhead.runs.secrets import line_of, without_key

PASSING = (408, 409, 425, 429)
"""Answers below 500 that say "later", not "no"."""
OF_THIS_CASE = (400, 413, 422)
"""Answers that are about one request (too long for the model, refused), not about the endpoint."""
NOT_OF_THIS_FORM = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading an answer raises that is no JSON, has other fields, or numbers or depths past all bounds."""
MOST_BYTES = 2**24
"""Of an answer: a completion has a few thousand."""
MOST_TOKENS = 2**40
LONGEST_WAIT = 120.0
"""Seconds that a Retry-After may ask for before it counts as no."""


class RefusedError(ValueError):
    """The endpoint does not take this one request; the others may still be judged."""


@dataclass(frozen=True)
class JudgeReply:
    """What a model said and how many tokens that took; finish: why it ended."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: str = ""


class Transport:
    """Sends chat completions. The key goes into a header and nowhere else.

    retries: further attempts after a 408, 409, 425, 429 or 5xx, a timeout, a broken connection or an answer that is no
    chat completion, with waits of backoff · 2^k seconds, jittered down to a half, or as long as Retry-After says.
    """

    def __init__(
        self,
        base_url: str,
        key: str,
        *,
        timeout: float,
        retries: int,
        backoff: float,
        connections: int,
    ) -> None:
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.key = key
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.stopped = threading.Event()
        self.client = httpx2.Client(
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def close(self) -> None:
        """No attempt begins any more, and no wait goes on."""
        self.stopped.set()
        self.client.close()

    def send(self, body: dict[str, Any]) -> JudgeReply:
        """The first choice of the completion.

        Raises RefusedError where this request is at fault, JudgeError where the endpoint or its settings are.
        """
        why = ""
        for attempt in range(self.retries + 1):
            wait = min(self.backoff * 2 ** min(attempt, 20) * random.uniform(0.5, 1.0), 3600.0)
            try:
                response = self._post(body)
            except (httpx2.TimeoutException, TimeoutError):
                why = f"did not answer within {self.timeout:g} s: raise judge_options.timeout or use a faster judge"
            except httpx2.UnsupportedProtocol as error:
                raise JudgeError(f"judge_options.base_url {self.url!r} is not an http address") from error
            except (httpx2.InvalidURL, httpx2.LocalProtocolError, UnicodeError) as error:
                raise JudgeError(
                    f"judge_options.base_url or the judge's key cannot be sent ({self._clean(error)})"
                ) from None
            except _TooLongError:
                why = f"answers more than {MOST_BYTES >> 20} MiB: check judge_options.base_url"
            except httpx2.RequestError as error:
                why = (
                    f"cannot be reached ({self._clean(error)}): check judge_options.base_url and the network"
                )
            else:
                if response.status_code == 200:
                    reply = parsed(response)
                    if reply is not None:
                        return replace(
                            reply,
                            text=without_key(reply.text, self.key),
                            finish=without_key(reply.finish, self.key),
                        )
                    why = (
                        "answers something that is no chat completion "
                        f"({self._clean(response.text)!r}): check judge_options.base_url"
                    )
                else:
                    why = f"answers {response.status_code} ({self._clean(error_of(response))})"
                    self._final(response.status_code, why)
                    asked = retry_after(response.headers.get("Retry-After"))
                    if asked is not None and asked > LONGEST_WAIT:
                        raise JudgeError(f"the judge at {self.url} {why} and asks to wait {asked:.0f} s")
                    wait = wait if asked is None else asked
            if attempt < self.retries and self.stopped.wait(wait):
                raise JudgeError("the judge was stopped")
        raise JudgeError(f"the judge at {self.url} {why}; tried {self.retries + 1} times")

    def _post(self, body: dict[str, Any]) -> httpx2.Response:
        """The whole answer; TimeoutError when it takes longer than an attempt may, however slowly it drips."""
        until = time.monotonic() + self.timeout
        parts: list[bytes] = []
        size = 0
        content = json.dumps(body, allow_nan=False).encode()
        headers = {"Content-Type": "application/json"}
        with self.client.stream("POST", self.url, content=content, headers=headers) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > MOST_BYTES:
                    raise _TooLongError
                if time.monotonic() > until:
                    raise TimeoutError
        # What was decoded on the way is not to be decoded again.
        kept = {
            name: value for name, value in response.headers.items() if name in ("content-type", "retry-after")
        }
        return httpx2.Response(response.status_code, headers=kept, content=b"".join(parts))

    def _final(self, status: int, why: str) -> None:
        """Raises for an answer that trying again would not change."""
        if status in OF_THIS_CASE:
            raise RefusedError(f"the judge {why}")
        if status in PASSING or status >= 500:
            return
        if status in (401, 403):
            why += ": check the key"
        elif status == 404:
            why += ": check judge_options.base_url and judge_options.model"
        raise JudgeError(f"the judge at {self.url} {why}")

    def _clean(self, said: object) -> str:
        """A short line of what was said, without the key, which some servers and libraries repeat."""
        return line_of(said, self.key)


class _TooLongError(Exception):
    """An answer has more bytes than any completion."""


def without_secrets(url: str) -> str:
    """An address as it may be shown: no user, password, query or fragment. JudgeError for what is none."""
    try:
        parts = urlsplit(url.strip())
    except ValueError as error:
        raise JudgeError(f"judge_options.base_url is not an address ({line_of(error)})") from None
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def parsed(response: httpx2.Response) -> JudgeReply | None:
    """The first choice of a chat completion, None where the answer is none."""
    try:
        body = response.json()
        choice = body["choices"][0]
        text = choice["message"].get("content") or ""
        used = body.get("usage") or {}
        return reply_of(
            {
                "text": text if isinstance(text, str) else json.dumps(text),
                "prompt_tokens": int(used.get("prompt_tokens") or 0),
                "completion_tokens": int(used.get("completion_tokens") or 0),
                "finish": str(choice.get("finish_reason") or ""),
            }
        )
    except NOT_OF_THIS_FORM:
        return None


def reply_of(fields: Mapping[str, Any]) -> JudgeReply | None:
    """A reply from its fields, as they were sent or kept; None where they are none of one."""
    text, finish = fields.get("text"), fields.get("finish", "")
    counts = [fields.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
    if not isinstance(text, str) or not isinstance(finish, str):
        return None
    if not all(type(count) is int and 0 <= count <= MOST_TOKENS for count in counts):
        return None
    # Halves of surrogate pairs are JSON, but no text that can be kept.
    whole, ending = (part.encode("utf-8", "replace").decode() for part in (text, finish))
    return JudgeReply(whole, counts[0], counts[1], ending)


def error_of(response: httpx2.Response) -> str:
    """The message of an error in the usual form, else what the answer begins with."""
    try:
        return str(response.json()["error"]["message"])
    except NOT_OF_THIS_FORM:
        return str(response.text)


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
