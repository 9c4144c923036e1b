"""One reader a kind of file: path in, documents out, one at a time."""

from __future__ import annotations

import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

BLOCK = 2**20
BOM = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
PLAIN = (".txt", ".md", ".rst", ".py")
SUFFIXES = (*PLAIN, ".jsonl", ".jsonl.gz", ".parquet")


class CorpusError(ValueError):
    """The text cannot be used: one sentence that names the file and what to change."""


@dataclass(frozen=True)
class Document:
    """A piece of text and its name inside the corpus."""

    id: str
    text: str


@dataclass(frozen=True)
class Place:
    """How far a corpus has been read.

    file: how many files are behind it. document: documents of the next one (of a data set: rows) behind it.
    read: bytes that count for `max_bytes` up to here; before: up to the beginning of the file.
    """

    file: int = 0
    document: int = 0
    read: int = 0
    before: int = 0


START = Place()


class Corpus(ABC):
    """A named collection of documents."""

    @abstractmethod
    def identity(self, sources: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What the corpus is, as JSON: equal identities mean equal documents in equal order.

        sources: what `sources` gave, if it was asked before.
        """

    def sources(self) -> dict[str, str]:
        """Size and content of each file by its name in the corpus; empty where there are no files to look at."""
        return {}

    def account(self) -> str | None:
        """What of the source is read and what is left, in a sentence; None where there is nothing to say."""
        return None

    @abstractmethod
    def read(self, begin: Place = START) -> Iterator[tuple[Document, Place]]:
        """Every document from `begin` on, each with the place behind it; none is empty, one is in memory at a time."""

    def documents(self) -> Iterator[Document]:
        """Every document once."""
        return (document for document, _ in self.read())


def suffix_of(path: Path) -> str:
    name = path.name.lower()
    return ".jsonl.gz" if name.endswith(".jsonl.gz") else path.suffix.lower()


def read_file(path: Path, name: str, *, text_field: str, part_bytes: int | None) -> Iterator[Document]:
    """The documents of one file; `name` begins their ids, `part_bytes` cuts plain text into parts.

    Raises CorpusError for a file that is missing, unreadable, empty or not what its suffix says. An empty `.py` file
    is passed over: packages are full of them.
    """
    suffix = suffix_of(path)
    try:
        if path.stat().st_size == 0:
            if suffix == ".py" and part_bytes is None:
                return
            raise CorpusError(f"'{path}' is empty: fill it or leave it out of the corpus")
        found = False
        for document in _documents(path, name, suffix, text_field, part_bytes):
            found = True
            yield document
    except FileNotFoundError as error:
        raise CorpusError(f"'{path}' is missing: restore it or correct corpus.source") from error
    except OSError as error:
        raise CorpusError(
            f"'{path}' cannot be read ({error.strerror or error}): repair it or leave it out"
        ) from error
    if not found and not (suffix == ".py" and part_bytes is None):
        raise CorpusError(
            f"'{path}' is empty: it holds no text but white space, fill it or leave it out of the corpus"
        )


def _documents(path: Path, name: str, suffix: str, field: str, part_bytes: int | None) -> Iterator[Document]:
    if suffix == ".parquet":
        return read_parquet(path, name, field)
    if suffix in PLAIN:
        return read_plain(path, name, part_bytes)
    return read_json_lines(path, name, field, gzip.open if suffix.endswith(".gz") else open)


def read_plain(path: Path, name: str, part_bytes: int | None) -> Iterator[Document]:
    """A text file as one document, or cut after paragraphs into documents of about `part_bytes`."""
    with path.open("rb") as file:
        if part_bytes is None:
            text = decode(file.read(), path, 0)
            if text.strip():
                yield Document(name, text)
            return
        for part, (offset, raw) in enumerate(parts(file, part_bytes)):
            text = decode(raw, path, offset)
            if text.strip():
                yield Document(f"{name}#{part}", text)


def parts(file: IO[bytes], size: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) pieces of at least `size` and less than twice that, the last one up to twice."""
    offset, pending = 0, b""
    while block := file.read(max(BLOCK, 2 * size)):
        pending += block
        while len(pending) >= 2 * size:
            end = cut(pending, size)
            yield offset, pending[:end]
            offset, pending = offset + end, pending[end:]
    if pending:
        yield offset, pending


def cut(raw: bytes, size: int) -> int:
    """Where to cut between `size` and twice that: after a blank line, else after a line, else between characters."""
    for mark in (b"\n\n", b"\n"):
        found = raw.find(mark, size - len(mark), 2 * size - len(mark))
        if found >= 0:
            return found + len(mark)
    end = size
    while end > size - 4 and raw[end] & 0xC0 == 0x80:
        end -= 1
    return end


def decode(raw: bytes, path: Path, offset: int) -> str:
    if offset == 0:
        if raw[:2] in UTF16_MARKS:
            raise CorpusError(f"'{path}' is UTF-16, not UTF-8: convert it or leave it out of the corpus")
        raw = raw.removeprefix(BOM)
    nul = raw.find(b"\0")
    if nul >= 0:
        raise CorpusError(f"'{path}' is binary (a NUL at byte {offset + nul}): leave it out of the corpus")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"'{path}' is not UTF-8 (byte {offset + error.start}): convert it to UTF-8 or leave it out of the corpus"
        ) from error


def read_json_lines(path: Path, name: str, field: str, opener: Callable[..., Any]) -> Iterator[Document]:
    """A document a line: an object whose `field` is the text; blank lines, blank texts and null are passed over."""
    offset = 0
    number = 0
    with opener(path, "rb") as file:
        lines = enumerate(file, start=1)
        while True:
            try:
                number, raw = next(lines)
            except StopIteration:
                return
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise CorpusError(
                    f"'{path}' is not a whole gzip file (after line {number}): make or download it again"
                ) from error
            line = decode(raw, path, offset).strip()
            offset += len(raw)
            if line:
                text = text_of(parse(line, path, number), field, f"line {number} of '{path}'")
                if text is not None and text.strip():
                    yield Document(f"{name}:{number}", text)


def parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise CorpusError(
            f"line {number} of '{path}' is not JSON ({error}): correct or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise CorpusError(
            f"line {number} of '{path}' is a JSON {type(record).__name__}, not an object: "
            'write one object such as {"text": "..."} a line'
        )
    return record


def text_of(record: dict[str, Any], field: str, where: str) -> str | None:
    """The text of a record; None where it is null, as it is in a table where a value is missing."""
    if field not in record:
        raise CorpusError(
            f"{where} has no field '{field}'; its fields are {', '.join(sorted(record)) or 'none'}: "
            "set corpus.text_field to one of them"
        )
    text = record[field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise CorpusError(
            f"field '{field}' in {where} is {type(text).__name__}, not text: set corpus.text_field"
        )
    return encodable(text, where)


def encodable(text: str, where: str) -> str:
    """`text` itself, unless it holds half of a surrogate pair, which no UTF-8 file and no tokenizer can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"the text in {where} holds an unpaired surrogate at character {error.start}"
        ) from error
    return text


def read_parquet(path: Path, name: str, field: str) -> Iterator[Document]:
    """A document a row, read batch by batch from the row groups; blank texts and missing values are passed over.

    A text column is of strings of any kind, or a dictionary (categorical) of them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise CorpusError(
            f"'{path}' is not a whole Parquet file ({error}): make or download it again"
        ) from error
    with file:
        schema = file.schema_arrow
        if field not in schema.names:
            raise CorpusError(
                f"'{path}' has no column '{field}'; its columns are {', '.join(schema.names)}: "
                "set corpus.text_field to one of them"
            )
        if schema.names.count(field) > 1:
            raise CorpusError(f"'{path}' has several columns '{field}': give each a name of its own")
        kind = schema.field(field).type
        if not is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise CorpusError(f"column '{field}' of '{path}' is {kind}, not text: set corpus.text_field")
        row = 0
        batches = file.iter_batches(batch_size=256, columns=[field])
        while True:
            try:
                texts = next(batches).column(0).to_pylist()
            except StopIteration:
                return
            except (pa.ArrowException, UnicodeDecodeError) as error:
                raise CorpusError(
                    f"'{path}' is broken after row {row} ({error}): make or download it again"
                ) from error
            for text in texts:
                if text is not None and text.strip():
                    yield Document(f"{name}:{row}", text)
                row += 1


def is_text(kind: Any) -> bool:
    """Whether a type of Arrow is of strings."""
    import pyarrow as pa

    checks = (pa.types.is_string, pa.types.is_large_string, getattr(pa.types, "is_string_view", None))
    return any(check(kind) for check in checks if check is not None)


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
