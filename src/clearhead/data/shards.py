"""Shards: the tokens of a large text on disk, written once and mapped into memory a few at a time.

A shard NUMBER is these files, of which the header is written last, so that a shard with a header is whole:

    NUMBER.bin         tokens of the training side, uint16 or uint32, little-endian; bos stands before each document
    NUMBER.starts.bin  where each document begins in it, uint32
    NUMBER.held.bin    tokens of the documents that are held out, without bos
    NUMBER.held.json   their names, shares (the hash that held them out), bytes and numbers of tokens
    NUMBER.json        the header: sizes, how far the text has been read, the sha256 of the files above
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clearhead.data.readers import CorpusError, Place
from clearhead.data.writing import replacing

FORMAT = 1
MANIFEST = "manifest.json"
SUFFIXES = (".bin", ".starts.bin", ".held.bin", ".held.json")
LARGEST = 2**32


@dataclass(frozen=True)
class Shard:
    """The header of a shard.

    tokens: with bos; documents, text_bytes: of the training side; held: documents that are held out, of held_bytes.
    place: where in the text the next shard begins. sums: sha256 by suffix.
    """

    tokens: int
    documents: int
    text_bytes: int
    held: int
    held_tokens: int
    held_bytes: int
    place: Place
    sums: dict[str, str]

    def sizes(self, width: int) -> dict[str, int]:
        """Bytes of the files whose size the header says, with tokens of `width` bytes."""
        return {
            ".bin": self.tokens * width,
            ".starts.bin": self.documents * 4,
            ".held.bin": self.held_tokens * width,
        }


@dataclass
class ShardContent:
    """Documents on their way into a shard; arrays hold token ids."""

    trained: list[NDArray[Any]] = field(default_factory=list)
    text_bytes: int = 0
    held: list[tuple[str, float, int, NDArray[Any]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.trained or self.held)


def token_type(vocabulary: int) -> np.dtype[Any]:
    """The smallest of the two types that hold every id of the vocabulary."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


def shard_path(folder: Path, number: int, suffix: str) -> Path:
    """A file of a shard."""
    return folder / f"{number:05}{suffix}"


def write_shard(
    folder: Path,
    number: int,
    content: ShardContent,
    place: Place,
    *,
    bos: int,
    seed: int,
    dtype: np.dtype[Any],
) -> Shard:
    """Write a shard, its training documents in an order shuffled by (seed, number).

    Each file is written in one step and the header last. Raises Unwritten on a full disk, CorpusError for more tokens
    than a shard can have.
    """
    order = np.random.default_rng([seed, number]).permutation(len(content.trained))
    lengths = np.array([len(content.trained[i]) + 1 for i in order], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    if total >= LARGEST:
        raise CorpusError(
            f"a document has about {total:,} tokens, more than a shard can hold: cut it into documents"
        )
    tokens = np.empty(total, dtype=dtype)
    for start, i in zip(starts.tolist(), order.tolist(), strict=True):
        tokens[start] = bos
        tokens[start + 1 : start + 1 + len(content.trained[i])] = content.trained[i]
    names, shares, sizes, held = zip(*content.held, strict=True) if content.held else ((), (), (), ())
    about = {"ids": names, "shares": shares, "bytes": sizes, "tokens": [len(one) for one in held]}
    parts: tuple[bytes | memoryview, ...] = (
        tokens.data.cast("B") if total else b"",
        starts.astype("<u4").tobytes(),
        b"".join(one.astype(dtype).tobytes() for one in held),
        json.dumps(about).encode(),
    )
    sums = {}
    for suffix, raw in zip(SUFFIXES, parts, strict=True):
        sums[suffix] = hashlib.sha256(raw).hexdigest()
        with replacing(shard_path(folder, number, suffix)) as part:
            part.write_bytes(raw)
    shard = Shard(
        total, len(order), content.text_bytes, len(held), sum(map(len, held)), sum(sizes), place, sums
    )
    header = {"format": FORMAT, "dtype": dtype.str, "bos_token_id": bos, **asdict(shard)}
    with replacing(shard_path(folder, number, ".json")) as part:
        part.write_text(json.dumps(header), encoding="utf-8")
    return shard


def read_shard(folder: Path, number: int, *, verify: bool = False) -> Shard | None:
    """The header of a shard whose files have the sizes that it says; None where there is none or something is missing.

    verify: also read the files and compare their checksums.
    """
    try:
        about = json.loads(shard_path(folder, number, ".json").read_bytes())
        if about.pop("format") != FORMAT:
            return None
        width = np.dtype(about.pop("dtype")).itemsize
        del about["bos_token_id"]
        shard = Shard(**{**about, "place": Place(**about["place"])})
        for suffix, size in shard.sizes(width).items():
            if shard_path(folder, number, suffix).stat().st_size != size:
                return None
        if verify and any(sha256(shard_path(folder, number, one)) != shard.sums[one] for one in SUFFIXES):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return shard


def sha256(path: Path) -> str:
    """The checksum of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenizedSource:
    """The shards of one text, opened for reading.

    name: what errors call it. At most `resident` shards are mapped at once: what was read of a mapped file counts as
    memory of the process until it is closed. A shard is compared with its checksums when it is mapped first.
    """

    def __init__(self, folder: Path, name: str, resident: int = 16) -> None:
        """Raises OSError, ValueError or KeyError where the manifest is none."""
        about = json.loads((folder / MANIFEST).read_bytes())
        self.folder = folder
        self.name = name
        self.resident = resident
        self.dtype = np.dtype(about["dtype"])
        self.bos_token_id = int(about["bos_token_id"])
        self.shards = [Shard(**{**one, "place": Place(**one["place"])}) for one in about["shards"]]
        self._open: OrderedDict[int, tuple[NDArray[Any], NDArray[Any]]] = OrderedDict()
        self._checked: set[tuple[int, str]] = set()

    @property
    def documents(self) -> int:
        """Documents of the training side."""
        return sum(one.documents for one in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of the training side, without bos."""
        return sum(one.tokens for one in self.shards) - self.documents

    @property
    def text_bytes(self) -> int:
        """Bytes of text of the training side."""
        return sum(one.text_bytes for one in self.shards)

    def open(self, number: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Tokens and starts of the documents of a shard with tokens, mapped. CorpusError for a damaged file."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        tokens = self._map(number, ".bin", self.dtype)
        starts = self._map(number, ".starts.bin", np.dtype("<u4"))
        self._open[number] = tokens, starts
        if len(self._open) > self.resident:
            self._open.popitem(last=False)
        return tokens, starts

    def held(self, number: int) -> Iterator[tuple[float, str, int, Callable[[], NDArray[Any]]]]:
        """Share, name, bytes of each document that a shard holds out, and what reads its tokens."""
        path = shard_path(self.folder, number, ".held.json")
        self._check(number, ".held.json")
        about = json.loads(path.read_bytes())
        at = 0
        for share, name, size, count in zip(
            about["shares"], about["ids"], about["bytes"], about["tokens"], strict=True
        ):
            yield share, name, size, self._reader(number, at, count)
            at += count

    def _reader(self, number: int, at: int, count: int) -> Callable[[], NDArray[Any]]:
        def read() -> NDArray[Any]:
            self._check(number, ".held.bin")
            path = shard_path(self.folder, number, ".held.bin")
            return np.fromfile(path, self.dtype, count, offset=at * self.dtype.itemsize)

        return read

    def _map(self, number: int, suffix: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        self._check(number, suffix)
        return np.memmap(shard_path(self.folder, number, suffix), dtype=dtype, mode="r")

    def _check(self, number: int, suffix: str) -> None:
        if (number, suffix) in self._checked:
            return
        path = shard_path(self.folder, number, suffix)
        try:
            fine = sha256(path) == self.shards[number].sums[suffix]
        except OSError as error:
            raise CorpusError(
                f"'{path}', tokens of '{self.name}', cannot be read ({error.strerror})"
            ) from error
        if not fine:
            raise CorpusError(
                f"'{path}', tokens of '{self.name}', is not what was written: run clearhead tokenize with the recipe, "
                "which makes damaged shards again"
            )
        self._checked.add((number, suffix))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}
