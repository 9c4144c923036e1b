"""Prompts and answers of an evaluation, a line each, that an interrupted one goes on from.

While it is measured the file is ``NAME.partial.jsonl``, whose first line says what the answers were measured with;
finished, it is ``NAME.jsonl``. A line that a killed process has left half written is dropped.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from clearhead.train.status import plain, write_text


class SampleLog:
    """The records so far; ``add`` writes one through to the disk. Without a folder they are kept in memory only."""

    def __init__(self, path: Path | None, keys: tuple[str, ...], about: dict[str, Any]) -> None:
        self.path = path
        self.keys = keys
        self.records: list[dict[str, Any]] = []
        self.known: set[tuple[Any, ...]] = set()
        self.file: TextIO | None = None
        if path is None:
            return
        # What JSON makes of it is what an earlier run has left.
        head = json.loads(json.dumps(about))
        lines = _lines(path)
        if lines and lines[0] == head:
            for record in lines[1:]:
                self._keep(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = [head, *self.records]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in whole))
        self.file = path.open("a", encoding="utf-8")

    @classmethod
    def open(
        cls,
        folder: Path | None,
        name: str,
        about: dict[str, Any],
        keys: tuple[str, ...] = ("needles", "asked", "length", "depth", "index"),
    ) -> SampleLog:
        """The log of evaluation ``name`` in ``folder``; earlier records count only if ``about`` is the same.

        keys: the fields of a record that tell it from the others.
        """
        return cls(None if folder is None else folder / f"{name}.partial.jsonl", keys, about)

    def _keep(self, record: dict[str, Any]) -> None:
        key = tuple(record[name] for name in self.keys)
        if key not in self.known:
            self.known.add(key)
            self.records.append(record)

    def has(self, key: tuple[Any, ...]) -> bool:
        return key in self.known

    def add(self, record: dict[str, Any]) -> None:
        self._keep(record)
        if self.file is not None:
            self.file.write(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")
            self.file.flush()

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is None or self.path is None:
            return
        self.file.close()
        if kind is None:
            self.path.replace(self.path.with_name(self.path.name.replace(".partial.", ".")))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file up to the first line that is not whole."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found += [json.loads(line)] if line else []
        except ValueError:
            break
    return found
