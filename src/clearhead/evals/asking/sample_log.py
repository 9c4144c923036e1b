"""Prompts and answers of an evaluation, a line each, that an interrupted one goes on from.

While it is measured the file is `NAME.partial.jsonl`, whose first line says what the answers were measured with;
finished, it is `NAME.jsonl`. Lines of the first end with a checksum: what a killed process has left half written, or
a disk has damaged, is dropped and measured again.
"""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from clearhead.data.writing import writing
from clearhead.runs.files import plain, write_text

Say = Callable[[str], None]
Key = tuple[Any, ...]
"""What tells a record from the others."""
Row = dict[str, Any]
SILENCE = 15.0
"""Seconds between two lines that say how far an evaluation is."""
CHECK = "check"
"""The field of a line's checksum."""


class SampleLog:
    """The records so far; `add` writes one through to the disk. Without a folder they are kept in memory only."""

    def __init__(
        self,
        path: Path | None,
        keys: tuple[str, ...],
        about: dict[str, Any],
        *,
        kept: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.path = path
        self.kept = kept
        self.progress = progress
        self.said = time.monotonic()
        self.keys = keys
        self.records: list[Row] = []
        self.known: dict[Key, Row] = {}
        # Records that the file does not get.
        self.passing: set[Key] = set()
        self.head: dict[str, Any] = {}
        self.file: TextIO | None = None
        if path is None:
            return
        # What JSON makes of it is what an earlier run has left.
        head = json.loads(_text(about))
        lines = _lines(path)
        if lines and lines[0] == head:
            for record in lines[1:]:
                if all(isinstance(record.get(name), str | int | float) for name in keys):
                    self._keep(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.head = head
        write_text(path, "".join(_checked(line) for line in (head, *self.records)))
        self.file = path.open("a", encoding="utf-8")

    @classmethod
    def open(
        cls,
        folder: Path | None,
        name: str,
        about: dict[str, Any],
        keys: tuple[str, ...] = ("needles", "asked", "length", "depth", "index"),
        *,
        kept: bool = True,
        reopened: bool = False,
        progress: Say | None = None,
    ) -> SampleLog:
        """The log of evaluation `name` in `folder`; earlier records count only if `about` is the same.

        keys: the fields of a record that tell it from the others. kept: whether the finished file stays.
        reopened: whether records of a finished file count, too.
        progress: is told now and then how many records there are.
        """
        say = None if progress is None else lambda count: progress(f"{name}: {count} so far")
        path = None if folder is None else folder / f"{name}.partial.jsonl"
        whole = None if folder is None else folder / f"{name}.jsonl"
        if reopened and path is not None and whole is not None and whole.exists() and not path.exists():
            shutil.copyfile(whole, path)
        return cls(path, keys, about, kept=kept, progress=say)

    def _keep(self, record: Row) -> None:
        key = self.key(record)
        if key not in self.known:
            self.known[key] = record
            self.records.append(record)

    def key(self, record: Row) -> Key:
        return tuple(record[name] for name in self.keys)

    def has(self, key: Key) -> bool:
        return key in self.known

    def of(self, keys: Iterable[Key]) -> list[Row]:
        """The records of those of `keys` that there are any of, in the order of `keys`."""
        return [self.known[key] for key in keys if key in self.known]

    def add(self, record: Row, *, lasting: bool = True) -> None:
        """Keep a record; on disk only a `lasting` one."""
        self._keep(record)
        if not lasting:
            self.passing.add(self.key(record))
            return
        if self.progress is not None and time.monotonic() - self.said > SILENCE:
            self.said = time.monotonic()
            self.progress(len(self.records))
        if self.file is not None and self.path is not None:
            with writing(self.path):
                self.file.write(_checked(record))
                self.file.flush()

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is None or self.path is None:
            return
        with writing(self.path):
            self.file.close()
        if kind is None:
            if self.kept:
                whole = self.path.with_name(self.path.name.replace(".partial.", "."))
                lasting = (record for record in self.records if self.key(record) not in self.passing)
                write_text(whole, "".join(f"{_text(line)}\n" for line in (self.head, *lasting)))
            self.path.unlink()


def _text(record: dict[str, Any]) -> str:
    return json.dumps(plain(record), ensure_ascii=False, allow_nan=False)


def _sum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _checked(record: dict[str, Any]) -> str:
    """A line: the record with a checksum of the rest of it as its last field."""
    text = _text(record)
    return f"{_text({**record, CHECK: _sum(text)})}\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file without those that are not whole; none where the first one is not."""
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    for number, raw in enumerate(path.read_bytes().split(b"\n")):
        try:
            record = json.loads(raw.decode())
            if not isinstance(record, dict):
                raise ValueError("a line is no record")
            # A finished file has no checksums, and more may be added to it.
            told = record.pop(CHECK, None)
            if told is not None and told != _sum(_text(record)):
                raise ValueError("a line is damaged")
        except (ValueError, RecursionError):
            if number == 0:
                return found
            continue
        found.append(record)
    return found
