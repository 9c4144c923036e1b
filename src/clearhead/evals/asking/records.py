"""Records of evaluations with questions of their own: JSON lines with the place of each, or a Hugging Face dataset."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clearhead.data.readers import decode, parse
from clearhead.evals.reasons import reason_of

Record = tuple[str, dict[str, Any]]
"""(where it stands, for an error, and the record)."""


class RecordError(ValueError):
    """A file that cannot be used as it is: one sentence that names it and what to change."""


class UnreachableError(ValueError):
    """A dataset that the Hugging Face hub did not give, for want of a network or of such a name."""


def read_records(source: str) -> Iterator[Record]:
    """The objects of a .jsonl, .jsonl.gz or .json file; a .json file is a list, or an object with a list `data`.

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
    number = 0
    try:
        for number, record in _numbered(path):
            where = f"line {number} of '{path}'"
            yield where, whole(record, where)
    except OSError as error:
        raise RecordError(
            f"'{path}' cannot be read after line {number} ({error.strerror or error})"
        ) from error


def _numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    offset = number = 0
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                line = decode(raw, path, offset).strip()
                offset += len(raw)
                if line:
                    yield number, parse(line, path, number)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(
            f"'{path}' is not a whole gzip file (after line {number}): make it again"
        ) from error


def _list(path: Path) -> Iterator[Record]:
    try:
        text = decode(path.read_bytes(), path, 0)
    except OSError as error:
        raise RecordError(f"'{path}' cannot be read ({error.strerror or error})") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"'{path}' is not JSON ({error}): correct it") from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecordError(f"'{path}' is neither a list of objects nor an object with such a list 'data'")
    for number, row in enumerate(rows, start=1):
        where = f"record {number} of '{path}'"
        yield where, whole(row, where)


def whole(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record itself; RecordError where it holds what no text and no other JSON reader has."""
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where} holds half of a surrogate pair ({error.object[error.start]!r}), which is no text: correct it"
        ) from error
    except ValueError as error:
        raise RecordError(f"{where} holds NaN or an infinity, which is no JSON: correct it") from error
    return record


def hub_records(dataset: str, config: str | None, split: str) -> Iterator[Record]:
    """The rows of one split of a Hugging Face dataset. Raises UnreachableError for what the hub does not give."""
    import datasets

    try:
        rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"row {number} of the dataset '{dataset}'", dict(row)
    # The library raises a dozen unrelated types for no network and for a wrong name.
    except Exception as error:
        raise UnreachableError(
            f"the Hugging Face dataset '{dataset}' cannot be read ({reason_of(error)})"
        ) from error


def text_of(record: dict[str, Any], name: str, where: str, option: str = "") -> str:
    """Field `name` as text; RecordError says which fields there are. `option`: what names the field."""
    value = value_of(record, name, where, option)
    if not isinstance(value, str) or not value.strip():
        kind = "empty" if isinstance(value, str) else type(value).__name__
        raise RecordError(f"field '{name}' in {where} is {kind}, not text")
    return value


def objects_of(record: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """Field `name` as a list of objects."""
    value = value_of(record, name, where)
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise RecordError(f"field '{name}' in {where} is not a list of objects")
    return value


def value_of(record: dict[str, Any], name: str, where: str, option: str = "") -> Any:
    """Field `name`, whatever it holds."""
    if name not in record:
        fields = ", ".join(sorted(map(str, record))) or "none"
        ask = f": set {option}" if option else ""
        raise RecordError(f"{where} has no field '{name}'; its fields are {fields}{ask}")
    return record[name]
