"""Records of evaluations with questions of their own: JSON lines with the place of each, or a Hugging Face dataset."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clearhead.data.readers import decode, parse
from clearhead.evals.base import reason_of

Record = tuple[str, dict[str, Any]]
"""(where it stands, for an error, and the record)."""


class RecordError(ValueError):
    """A file that cannot be used as it is: one sentence that names it and what to change."""


class UnreachableError(ValueError):
    """A dataset that the Hugging Face hub did not give, for want of a network or of such a name."""


def read_records(source: str) -> Iterator[Record]:
    """The objects of a .jsonl, .jsonl.gz or .json file; a .json file is a list, or an object with a list ``data``.

    Raises RecordError (or CorpusError) for a file that is missing, empty or broken.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise RecordError(f"there is no file '{path}': name a .jsonl, .jsonl.gz or .json file")
    name = path.name.lower()
    if not name.endswith((".jsonl", ".jsonl.gz", ".json")):
        raise RecordError(f"'{path}' is none of .jsonl, .jsonl.gz, .json: convert it")
    count = 0
    for record in _list(path) if name.endswith(".json") else json_lines(path):
        count += 1
        yield record
    if not count:
        raise RecordError(f"'{path}' is empty: it holds no record")


def json_lines(path: Path) -> Iterator[Record]:
    """The objects of a .jsonl or .jsonl.gz file. Raises RecordError (or CorpusError) where it is broken."""
    offset = number = 0
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                line = decode(raw, path, offset).strip()
                offset += len(raw)
                if line:
                    yield f"line {number} of '{path}'", parse(line, path, number)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(
            f"'{path}' is not a whole gzip file (after line {number}): make it again"
        ) from error


def _list(path: Path) -> Iterator[Record]:
    text = decode(path.read_bytes(), path, 0)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"'{path}' is not JSON ({error}): correct it") from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecordError(f"'{path}' is neither a list of objects nor an object with such a list 'data'")
    for number, row in enumerate(rows, start=1):
        yield f"record {number} of '{path}'", row


def hub_records(dataset: str, config: str | None, split: str) -> Iterator[Record]:
    """The rows of one split of a Hugging Face dataset. Raises UnreachableError for what the hub does not give."""
    import datasets

    try:
        rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"row {number} of the dataset '{dataset}'", dict(row)
    except (
        Exception
    ) as error:  # the library raises a dozen unrelated types for no network and for a wrong name
        raise UnreachableError(
            f"the Hugging Face dataset '{dataset}' cannot be read ({reason_of(error)})"
        ) from error


def text_of(record: dict[str, Any], name: str, where: str, option: str = "") -> str:
    """Field ``name`` as text; RecordError says which fields there are. ``option``: what names the field."""
    value = value_of(record, name, where, option)
    if not isinstance(value, str) or not value.strip():
        kind = "empty" if isinstance(value, str) else type(value).__name__
        raise RecordError(f"field '{name}' in {where} is {kind}, not text")
    return value


def value_of(record: dict[str, Any], name: str, where: str, option: str = "") -> Any:
    """Field ``name``, whatever it holds."""
    if name not in record:
        fields = ", ".join(sorted(map(str, record))) or "none"
        ask = f": set {option}" if option else ""
        raise RecordError(f"{where} has no field '{name}'; its fields are {fields}{ask}")
    return record[name]
