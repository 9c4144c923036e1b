"""Replies of a paid judge, kept on disk: what was asked once is never paid again."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from clearhead.data.cache import digest_json
from clearhead.evals.faithfulness.judges.base import JudgeError


class ReplyStore:
    """A file of JSON lines, `{"key", "reply"}`, that processes may share; a line half written counts as none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            # A killed process may have left the last line without its end.
            self.separator = "\n" if text and not text.endswith("\n") else ""
            with path.open("a", encoding="utf-8"):
                pass
        except OSError as error:
            raise JudgeError(
                f"the judge's replies cannot be kept in '{path}' ({error.strerror}): set judge_options.cache"
            ) from error
        for line in text.split("\n"):
            try:
                record = json.loads(line)
                self.known[record["key"]] = dict(record["reply"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue

    @staticmethod
    def key(request: dict[str, Any]) -> str:
        """Of everything that is sent: endpoint, model, messages and settings. No key of an account is among it."""
        return digest_json(request)

    def get(self, key: str) -> dict[str, Any] | None:
        with self.lock:
            return self.known.get(key)

    def put(self, key: str, reply: dict[str, Any]) -> None:
        with self.lock:
            self.known[key] = reply
            line = json.dumps({"key": key, "reply": reply}, ensure_ascii=False)
            # One write of a whole line: other processes append to the same file.
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(f"{self.separator}{line}\n")
            except OSError as error:
                raise JudgeError(
                    f"the judge's reply cannot be kept in '{self.path}' ({error.strerror}): make room, or set "
                    "judge_options.cache"
                ) from error
            self.separator = ""
