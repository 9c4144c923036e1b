"""Keys and passwords: refused where they would be written down, blotted out of every text that is shown or kept.

Options of a judge stand in recipes, results and files of verdicts, so a secret has no place in them: it comes from an
environment variable, and this is the one place that knows what one looks like.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

NAMES = {
    "apikey", "xapikey", "key", "token", "accesstoken", "authtoken", "authorization", "password", "passwd", "secret",
    "bearer",
}  # fmt: skip
"""What secrets are called, without case, hyphens and underscores."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
USER = re.compile(r"([A-Za-z][\w+.-]*://)[^\s/'\"]*@")
NAMED = re.compile(
    r"(?i)\b(x-api-key|api[-_]?key|access[-_]?token|auth[-_]?token|password|passwd|secret|authorization)"
    r"(\\?[\"']?\s*[=:]\s*\\?[\"']?)(?:(?:bearer|basic)\s+)?[^\s&\"',;}\\]+"
)
SHORTEST = 8
"""Characters of a key that is looked for in an answer: "EMPTY" and the like stand there by chance."""


def redacted(text: str, key: str = "") -> str:
    """`text` without passwords in addresses, values that are named as secrets, and `key` in any spelling."""
    for form in _spellings(key):
        text = text.replace(form, "***")
    return NAMED.sub(r"\1\2***", USER.sub(r"\1***@", text))


def without_key(text: str, key: str) -> str:
    """A model's answer, which is kept as it is but for a key that it repeats."""
    for form in _spellings(key) if len(key) >= SHORTEST else ():
        text = text.replace(form, "***")
    return text


def line_of(said: object, key: str = "", longest: int = 200) -> str:
    """One short line of what a server or a library said, fit for a terminal and without secrets."""
    text = redacted(str(said), key)
    text = "".join(c if c.isprintable() else " " for c in text)
    return redacted(" ".join(text.split()), key)[:longest] or type(said).__name__


def secret_in(options: Any, where: str = "judge_options") -> str | None:
    """What in a judge's options is a secret, in a clause that does not show it; None where nothing is."""
    if isinstance(options, str):
        return _secret_address(options, where)
    parts: Iterator[tuple[Any, Any]] | Any = ()
    if isinstance(options, dict):
        parts = options.items()
    elif isinstance(options, list | tuple):
        parts = enumerate(options)
    for name, value in parts:
        inner = f"{where}.{name}"
        plain = re.sub(r"[-_ ]", "", str(name)).lower()
        if plain == "apikeyenv":
            if isinstance(value, str) and value and not VARIABLE.fullmatch(value):
                return f"{inner} is not the name of an environment variable"
        elif plain in NAMES and value not in ("", None):
            return f"{inner} is a secret"
        elif found := secret_in(value, inner):
            return found
    return None


def _secret_address(text: str, where: str) -> str | None:
    if "://" not in text:
        return None
    try:
        parts = urlsplit(text.strip())
        names = [
            re.sub(r"[-_]", "", name).lower() for name, _ in parse_qsl(parts.query, keep_blank_values=True)
        ]
    except ValueError:
        return f"{where} is not an address"
    if "@" in parts.netloc:
        return f"{where} holds a user or a password"
    return f"{where} holds a secret in its query" if NAMES.intersection(names) else None


def _spellings(key: str) -> list[str]:
    """The forms in which servers and libraries repeat a key, longest first."""
    if not key:
        return []
    forms = {
        key, repr(key)[1:-1], json.dumps(key)[1:-1], json.dumps(key, ensure_ascii=False)[1:-1], quote(key, safe=""),
        " ".join(key.split()), base64.b64encode(key.encode("utf-8", "replace")).decode(),
    }  # fmt: skip
    return sorted(filter(None, forms), key=len, reverse=True)
