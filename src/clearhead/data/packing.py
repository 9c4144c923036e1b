"""From prepared tokens to training rows and evaluation windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from clearhead.data.prepare import DataSpec, PreparedData, prepare
from clearhead.data.readers import CorpusError
from clearhead.data.store import IGNORED as IGNORED
from clearhead.data.store import Example, TokenStore
from clearhead.data.streamed import MixedRows, StreamedText

__all__ = [
    "DataSpec",
    "Example",
    "PackedText",
    "PreparedData",
    "TokenStore",
    "pack_text",
    "prepare",
    "validation_windows",
]


class PackedText:
    """Rows of exactly `length` tokens cut from documents laid end to end; see `pack_text`."""

    def __init__(self, store: TokenStore, length: int, seed: int, document_masks: bool) -> None:
        if length < 2:
            raise CorpusError(f"data.length is {length}: a row needs at least 2 tokens to predict anything")
        # Every document is preceded by one bos token.
        self.sizes = np.diff(store.offsets) + 1
        self.rows = int(self.sizes.sum()) // length
        if self.rows == 0:
            raise CorpusError(
                f"the split holds {int(self.sizes.sum())} tokens, less than one row of {length}: use more text or a "
                "smaller data.length"
            )
        self.store = store
        self.length = length
        self.seed = seed
        self.document_masks = document_masks
        self._epoch = -1
        self._order = self._starts = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return self.rows

    def __iter__(self) -> Iterator[Example]:
        """The rows of epoch 0."""
        return (self[i] for i in range(self.rows))

    def __getitem__(self, index: int) -> Example:
        if index < 0:
            raise IndexError(f"row {index}: rows are counted from 0 without end")
        epoch, row = divmod(int(index), self.rows)
        order, starts = self._layout(epoch)
        begin, end = row * self.length, (row + 1) * self.length
        input_ids = np.empty(self.length, dtype=np.int64)
        positions = np.arange(self.length, dtype=np.int64)
        heads = []
        at = begin
        place = int(np.searchsorted(starts, begin, side="right")) - 1
        while at < end:
            document = self.store.document(int(order[place]))
            within = at - int(starts[place])
            head = at - begin
            take = min(end - at, len(document) + 1 - within)
            if within == 0:
                input_ids[head] = self.store.bos_token_id
                input_ids[head + 1 : head + take] = document[: take - 1]
            else:
                input_ids[head : head + take] = document[within - 1 : within - 1 + take]
            if self.document_masks:
                positions[head : head + take] = np.arange(take)
            heads.append(head)
            at += take
            place += 1
        labels = input_ids.copy()
        labels[heads] = IGNORED
        return {"input_ids": input_ids, "labels": labels, "position_ids": positions}

    def _layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Order of the documents in an epoch and where each begins; the last epoch asked for is kept."""
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
            starts = np.zeros(len(order), dtype=np.int64)
            np.cumsum(self.sizes[order[:-1]], out=starts[1:])
            self._epoch, self._order, self._starts = epoch, order, starts
        return self._order, self._starts


def pack_text(
    store: TokenStore | StreamedText, length: int, seed: int, *, document_masks: bool
) -> PackedText | MixedRows:
    """Training rows: every token of `store` once an epoch, in rows of exactly `length` tokens.

    The documents, each preceded by bos, are laid end to end in an order shuffled by `(seed, epoch)` and cut; an end
    shorter than a row is dropped. `rows[i]` for any `i >= 0` is row `i % len(rows)` of epoch `i // len(rows)`
    and depends on nothing but `(store, length, seed, i)`: a resumed run sees what an uninterrupted one does.
    Memory grows with the number of documents, not of tokens.

    An example holds int64 arrays of shape (length,): `input_ids`; `labels`, equal to them (unshifted, as Hugging
    Face models want) except -100 at the first token of each piece of a document, which nothing predicts;
    `position_ids`, which restart at 0 at each piece with `document_masks` (no attention across documents), else
    run through the row.

    Streamed text has rows of its own, equal in form: `streamed.MixedRows`.

    Raises CorpusError when the store does not fill one row.
    """
    if isinstance(store, StreamedText):
        return store.rows(length, seed, document_masks=document_masks)
    return PackedText(store, length, seed, document_masks)


def validation_windows(
    store: TokenStore, length: int, *, max_documents: int | None = None
) -> Iterator[tuple[int, NDArray[np.int64], int]]:
    """Windows of single documents in which each document token is predicted exactly once, for bits per byte.

    Yields `(document, input_ids, start)`. A document is read as bos and its tokens; a window has at most `length`
    ids, the first of which is context only, and the next window begins with the last id of this one. So
    `input_ids[1:]` are the document's tokens `start, start + 1, ...`, and the sum of their losses over the windows
    of a document, divided by `store.utf8_bytes[document] * log(2)`, is its bits per byte. Nothing is carried over:
    **the context restarts at each window**, so a short `length` costs bits.

    `max_documents` takes the first documents; a validation store lies in hash order, so they are a random sample.
    """
    if length < 2:
        raise CorpusError(
            f"the window length is {length}: a window needs at least 2 tokens to predict anything"
        )
    documents = len(store) if max_documents is None else min(max_documents, len(store))
    for i in range(documents):
        ids = np.concatenate([[store.bos_token_id], store.document(i)]).astype(np.int64)
        for start in range(0, len(ids) - 1, length - 1):
            yield i, ids[start : start + length], start
