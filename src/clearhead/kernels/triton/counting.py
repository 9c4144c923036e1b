"""What a call of the Triton kernels does, counted from its blocks: a model, which nothing here has been timed against.

    executed   multiply-adds of all tiles that are visited, the hidden half of diagonal ones included
    asked      bytes that programs ask of the cache level they share, tile by tile
    moved      bytes of every tensor read or written once: what must come from and go to memory

A causal or open mask with as many queries as keys; the Transformer twin is the same kernel with one stream.
"""

import math
from dataclasses import dataclass

from clearhead.kernels.triton.configs import Config


@dataclass(frozen=True, slots=True)
class CountedAttention:
    """One call: `heads` and `groups` of one stream, as in `core.streams`.

    normed: the kernel norms its rows itself. held: keys have half their width, and a float32 table makes them whole.
    """

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    width: int
    value_width: int
    streams: int
    own_keys: bool
    causal: bool
    bytes: int = 2
    normed: bool = False
    held: bool = False

    @property
    def rows(self) -> int:
        return self.queries * (self.heads // self.groups)

    @property
    def pairs(self) -> int:
        return self.batch * self.groups

    @property
    def key_numbers(self) -> int:
        """Numbers of K and V for one key of a group."""
        width = self.width // 2 if self.held else self.width
        return (2 if self.own_keys else 1) * width + self.value_width

    @property
    def table(self) -> int:
        """Bytes of the table for one key, which all heads, streams and rows of the batch share."""
        return 4 * self.width if self.held else 0

    @property
    def row_numbers(self) -> int:
        """Numbers of Q and of the output for one row."""
        return self.streams * self.width + self.value_width


@dataclass(frozen=True, slots=True)
class Work:
    executed: int
    asked: int
    moved: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.executed + other.executed, self.asked + other.asked, self.moved + other.moved)


def twin(attention: CountedAttention) -> CountedAttention:
    """The Transformer's attention with as many projections: V1's pairs as two heads, V2's signal heads alone."""
    double = 2 if attention.own_keys else 1
    return CountedAttention(
        attention.batch,
        double * attention.heads,
        double * attention.groups,
        *(attention.queries, attention.keys, attention.width, attention.width, 1, False),
        attention.causal,
        attention.bytes,
    )


def tiles(attention: CountedAttention, config: Config) -> int:
    """Tiles of one key-value group that are visited."""
    total, repeats = 0, attention.heads // attention.groups
    for block in range(math.ceil(attention.rows / config.block_m)):
        keys = attention.keys
        if attention.causal:
            last = min((block * config.block_m + config.block_m - 1) // repeats, attention.queries - 1)
            keys = min(keys, last + 1 + attention.keys - attention.queries)
        total += math.ceil(keys / config.block_n)
    return total


def forward(attention: CountedAttention, config: Config, keep: bool = True) -> Work:
    a, per_tile = attention, config.block_m * config.block_n
    visited = tiles(a, config)
    row_blocks = math.ceil(a.rows / config.block_m) * config.block_m
    # The noise stream's own output, rows before a norm, and two statistics a stream.
    kept = ((a.streams == 2) + a.normed) * a.value_width * a.bytes + 8 * a.streams if keep else 0
    rows = a.row_numbers * a.bytes + kept
    return Work(
        executed=a.pairs * visited * per_tile * a.streams * (a.width + a.value_width),
        asked=a.pairs * (visited * config.block_n * (a.key_numbers * a.bytes + a.table) + row_blocks * rows),
        moved=a.pairs * (a.keys * a.key_numbers * a.bytes + a.rows * rows) + a.keys * a.table,
    )


def deltas(attention: CountedAttention) -> int:
    """Bytes of rows before the backward pass: dO (or dY), O and O_2 are read, and with a norm dO is written."""
    a = attention
    return a.pairs * a.rows * a.value_width * a.bytes * (1 + a.streams + a.normed)


def norm_apart(attention: CountedAttention, backward: bool) -> int:
    """Bytes of rows of a norm that is one kernel of its own: O in, Y out; behind that dY and O in, dO out."""
    a = attention
    return a.pairs * a.rows * a.value_width * a.bytes * (3 if backward else 2)


def expansion(attention: CountedAttention) -> int:
    """Bytes of one kernel of its own that makes held keys whole: t and the table in, keys out."""
    a = attention
    streams = 2 if a.own_keys else 1
    return a.pairs * a.keys * streams * a.width * a.bytes * 3 // 2 + a.keys * 4 * a.width


def backward(attention: CountedAttention, config: Config, stretches: int = 1) -> Work:
    a, per_tile = attention, config.block_m * config.block_n
    visited = tiles(a, config)
    # Q, dO, four statistics and two deltas are read and dQ is read and written, for each tile; λ for two streams.
    row = a.row_numbers * a.bytes + 12 * a.streams + 4 * (a.streams - 1) + 8 * a.streams * a.width
    # K and V are read and their float32 gradients read and written, for each block of keys and launch.
    key = a.key_numbers * (a.bytes + 8)
    once = a.rows * (2 * a.row_numbers * a.bytes + 8 * a.streams * a.width) + a.keys * a.key_numbers * (
        2 * a.bytes + 8
    )
    return Work(
        executed=a.pairs * visited * per_tile * (3 * a.streams * a.width + 2 * a.value_width),
        asked=a.pairs * (visited * config.block_m * row + stretches * a.keys * key),
        moved=a.pairs * once,
    )
