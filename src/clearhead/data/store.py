"""Tokens of a split on disk: a flat memory-mapped array and the borders of its documents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Example = dict[str, NDArray[np.int64]]
IGNORED = -100


class TextRows(Protocol):
    """Packed text (`packing.pack_text`): `[i]` works for every `i >= 0`."""

    def __getitem__(self, index: int, /) -> Example: ...


class DamagedStore(Exception):
    """The files on disk do not belong together."""


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The documents of one split as token ids.

    tokens: (num_tokens,) uint16 or uint32, memory-mapped; no special token between documents.
    offsets: (documents + 1,) int64, document i is `tokens[offsets[i]:offsets[i + 1]]`.
    utf8_bytes: (documents,) int64, bytes of text of each document.
    ids: the name of each document in its corpus.
    bos_token_id: the token that is put before a document.
    folder: where the arrays lie, None for a store in memory; a store on disk pickles as its path.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    utf8_bytes: NDArray[np.int64]
    ids: list[str]
    bos_token_id: int
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token stands for on average."""
        return float(self.utf8_bytes.sum()) / self.num_tokens

    def document(self, i: int) -> NDArray[Any]:
        """Token ids of document `i`, without bos."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of a store with {len(self)} documents")
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @classmethod
    def from_documents(
        cls, documents: list[list[int]], *, bos_token_id: int, utf8_bytes: list[int] | None = None
    ) -> TokenStore:
        """A store in memory; `utf8_bytes` defaults to one byte a token."""
        lengths = [len(document) for document in documents]
        flat = [token for document in documents for token in document]
        return cls(
            tokens=np.array(flat, dtype=np.uint32),
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            utf8_bytes=np.array(utf8_bytes if utf8_bytes is not None else lengths, dtype=np.int64),
            ids=[str(i) for i in range(len(documents))],
            bos_token_id=bos_token_id,
        )

    @classmethod
    def load(cls, folder: Path) -> TokenStore:
        """Open a store written by `TokenWriter`; raises DamagedStore when its files do not fit together."""
        try:
            about = json.loads((folder / "store.json").read_text())
            ids = json.loads((folder / "ids.json").read_text())
            offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            utf8_bytes = np.load(folder / "utf8_bytes.npy", allow_pickle=False)
            tokens = np.memmap(folder / "tokens.bin", dtype=about["dtype"], mode="r")
            bos_token_id = int(about["bos_token_id"])
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise DamagedStore(f"{folder}: {error}") from error
        documents = len(ids)
        if not (
            len(offsets) == documents + 1 and len(utf8_bytes) == documents and offsets[-1] == len(tokens)
        ):
            raise DamagedStore(
                f"{folder}: {documents} names, {len(offsets) - 1} documents, {len(tokens)} tokens"
            )
        return cls(tokens, offsets, utf8_bytes, ids, bos_token_id, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:
            return TokenStore.load, (self.folder,)
        return TokenStore, (self.tokens, self.offsets, self.utf8_bytes, self.ids, self.bos_token_id)


class TokenWriter:
    """Writes a store document by document: `with TokenWriter(...) as writer: writer.add(...)`."""

    def __init__(self, folder: Path, *, vocab_size: int, bos_token_id: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.dtype = np.dtype(np.uint16 if vocab_size < 2**16 else np.uint32)
        self.bos_token_id = bos_token_id
        self.lengths: list[int] = []
        self.utf8_bytes: list[int] = []
        self.ids: list[str] = []
        self.file = (folder / "tokens.bin").open("wb")

    def add(self, name: str, tokens: list[int], utf8_bytes: int) -> None:
        self.file.write(np.array(tokens, dtype=self.dtype).tobytes())
        self.lengths.append(len(tokens))
        self.utf8_bytes.append(utf8_bytes)
        self.ids.append(name)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if kind is not None:
            return
        offsets = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        np.save(self.folder / "offsets.npy", offsets)
        np.save(self.folder / "utf8_bytes.npy", np.array(self.utf8_bytes, dtype=np.int64))
        (self.folder / "ids.json").write_text(json.dumps(self.ids))
        (self.folder / "store.json").write_text(
            json.dumps({"dtype": self.dtype.str, "bos_token_id": self.bos_token_id})
        )
