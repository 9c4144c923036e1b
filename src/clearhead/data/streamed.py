"""Rows of text streamed from shards: any row by its number, in memory that does not grow with the text.

Row i is a pure function of (shards, weights, length, seed, i). So the position in the stream is one number, arms and
processes see the same rows, and whoever goes on from row i sees what an uninterrupted process would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clearhead.data.readers import CorpusError
from clearhead.data.shards import TokenizedSource
from clearhead.data.store import IGNORED, Example
from clearhead.data.weights import WHOLE

# Shards whose rows are shuffled together, of all sources: what is mapped at once.
RESIDENT = 16
# Last word of the seed of a random stream: the order of shards, and of the rows of some shards.
_SHARDS, _ROWS = 1, 2


class Interleaving:
    """Which source row i is of: the one that lags most behind its share, as in Megatron's blended data sets.

    So in any first n rows two sources have their shares exact to less than a row, several nearly so. The choice repeats
    after `period` rows, which are kept as a table.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        """shares: whole numbers, such as `whole_shares` gives."""
        common = gcd(*shares)
        self.counts = [share // common for share in shares]
        self.period = sum(self.counts)
        wanted = np.array(self.counts, dtype=np.int64)
        made = np.zeros(len(shares), dtype=np.int64)
        self.source = np.empty(self.period, dtype=np.int32)
        self.number = np.empty(self.period, dtype=np.int32)
        for place in range(self.period):
            chosen = int(np.argmax(wanted * (place + 1) - made * self.period))
            self.source[place], self.number[place] = chosen, made[chosen]
            made[chosen] += 1

    def at(self, index: int) -> tuple[int, int]:
        """The source of row `index` and its number among the rows of that source."""
        rounds, place = divmod(index, self.period)
        source = int(self.source[place])
        return source, rounds * self.counts[source] + int(self.number[place])

    def before(self, index: int) -> list[int]:
        """How many of the first `index` rows are of each source."""
        rounds, place = divmod(index, self.period)
        some = np.bincount(self.source[:place], minlength=len(self.counts))
        return [rounds * count + int(more) for count, more in zip(self.counts, some, strict=True)]


@dataclass(frozen=True)
class Layout:
    """An epoch of a source: its shards in their order, the rows before each of them, where each shard's rows begin."""

    order: NDArray[np.int64]
    ends: NDArray[np.int64]
    offsets: NDArray[np.int64]


class SourceRows:
    """The rows of one source: `rows` an epoch, every shard's tokens once but for less than a row of each.

    A shard is a ring, cut into rows from a place that each epoch draws. The order of the shards is drawn too, and the
    rows of `block` of them are shuffled together.
    """

    def __init__(
        self,
        source: TokenizedSource,
        number: int,
        length: int,
        seed: int,
        *,
        document_masks: bool,
        block: int,
    ) -> None:
        self.source = source
        self.length = length
        self.document_masks = document_masks
        self.block = block
        self.key = (seed, number)
        self.per_shard = np.array([shard.tokens // length for shard in source.shards], dtype=np.int64)
        self.rows = int(self.per_shard.sum())
        if self.rows == 0:
            raise CorpusError(
                f"'{source.name}' has {source.num_tokens + source.documents:,} tokens, less than one row of {length}: "
                "use more text or a smaller data.length"
            )
        self._layout: tuple[int, Layout] | None = None
        self._shuffled: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def __getitem__(self, index: int) -> Example:
        epoch, row = divmod(index, self.rows)
        layout = self._epoch(epoch)
        first = int(np.searchsorted(layout.ends, row, side="right")) // self.block * self.block
        last = min(first + self.block, len(layout.ends))
        begin = int(layout.ends[first - 1]) if first else 0
        place = begin + int(self._shuffle(epoch, first, int(layout.ends[last - 1]) - begin)[row - begin])
        at = int(np.searchsorted(layout.ends, place, side="right"))
        within = place - (int(layout.ends[at - 1]) if at else 0)
        shard = int(layout.order[at])
        return self._row(shard, int(layout.offsets[shard]) + within * self.length)

    def _epoch(self, epoch: int) -> Layout:
        if self._layout is None or self._layout[0] != epoch:
            rng = np.random.default_rng([*self.key, epoch, _SHARDS])
            order = rng.permutation(len(self.per_shard))
            offsets = rng.integers(self.length, size=len(order))
            self._layout = epoch, Layout(order, np.cumsum(self.per_shard[order]), offsets)
        return self._layout[1]

    def _shuffle(self, epoch: int, first: int, count: int) -> NDArray[np.int64]:
        if self._shuffled is None or self._shuffled[0] != (epoch, first):
            rng = np.random.default_rng([*self.key, epoch, first, _ROWS])
            self._shuffled = (epoch, first), rng.permutation(count)
        return self._shuffled[1]

    def _row(self, shard: int, begin: int) -> Example:
        tokens, starts = self.source.open(shard)
        size = len(tokens)
        begin %= size
        end = begin + self.length
        input_ids = np.empty(self.length, dtype=np.int64)
        heads = [0]
        done = 0
        # The end of a shard is followed by its beginning, where a document begins.
        for low, high in ((begin, min(end, size)), (0, end - size)):
            if high <= low:
                continue
            input_ids[done : done + high - low] = tokens[low:high]
            within = starts[np.searchsorted(starts, low) : np.searchsorted(starts, high)].astype(np.int64)
            heads += (within - low + done).tolist()
            done += high - low
        labels = input_ids.copy()
        labels[heads] = IGNORED
        positions = np.arange(self.length, dtype=np.int64)
        if self.document_masks:
            pieces = np.zeros(self.length, dtype=np.int64)
            pieces[heads] = heads
            positions -= np.maximum.accumulate(pieces)
        return {"input_ids": input_ids, "labels": labels, "position_ids": positions}


class MixedRows:
    """Rows of several sources by weight, each of `length` tokens; an example is as in `packing.pack_text`."""

    def __init__(self, sources: Sequence[SourceRows], shares: Sequence[int]) -> None:
        self.sources = list(sources)
        self.length = self.sources[0].length
        self.interleaving = Interleaving(shares)

    def __len__(self) -> int:
        """Rows that go once through all the text, whatever the weights."""
        return sum(source.rows for source in self.sources)

    def __getitem__(self, index: int) -> Example:
        if index < 0:
            raise IndexError(f"row {index}: rows are counted from 0 without end")
        source, number = self.interleaving.at(int(index))
        return self.sources[source][number]

    def position(self, index: int) -> dict[str, dict[str, int]]:
        """How far each source is read when `index` rows are: rows of it, and so epoch and row in the epoch."""
        found = {}
        for rows, count in zip(self.sources, self.interleaving.before(index), strict=True):
            epoch, row = divmod(count, rows.rows)
            found[rows.source.name] = {"rows": count, "epoch": epoch, "row": row}
        return found

    def epochs(self, count: float) -> dict[str, float]:
        """How many times `count` rows go through each source."""
        parts = self.interleaving
        return {
            rows.source.name: count * part / parts.period / rows.rows
            for rows, part in zip(self.sources, parts.counts, strict=True)
        }


@dataclass(frozen=True, eq=False)
class StreamedText:
    """The training side of a text in shards: what `store.TokenStore` is for one that is small.

    shares: of the rows, in ten-thousandths, one a source.
    """

    sources: tuple[TokenizedSource, ...]
    shares: tuple[int, ...]

    def __len__(self) -> int:
        return sum(source.documents for source in self.sources)

    @property
    def num_tokens(self) -> int:
        """Tokens without bos."""
        return sum(source.num_tokens for source in self.sources)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token of a row stands for on average."""
        pairs = zip(self.sources, self.shares, strict=True)
        return sum(share / WHOLE * source.text_bytes / source.num_tokens for source, share in pairs)

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """Tokens around retrieval documents, without bos: one shard of the source with the largest weight."""
        source = self.sources[int(np.argmax(self.shares))]
        largest = int(np.argmax([shard.tokens for shard in source.shards]))
        tokens, starts = source.open(largest)
        return np.delete(tokens, starts)

    def rows(self, length: int, seed: int, *, document_masks: bool) -> MixedRows:
        """Rows without end. CorpusError for a source that does not fill one."""
        block = max(2, RESIDENT // len(self.sources))
        return MixedRows(
            [
                SourceRows(one, number, length, seed, document_masks=document_masks, block=block)
                for number, one in enumerate(self.sources)
            ],
            self.shares,
        )
