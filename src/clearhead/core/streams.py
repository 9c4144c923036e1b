"""The values that travel through one attention layer.

Legend: B batch, H query heads of one stream, G key-value heads, L queries, S keys, D key width, E value width, K key
    streams.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clearhead.core.norm import HeadNorm
from clearhead.core.quantised import Held


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def closed_gate(logit: Tensor) -> Tensor:
    """σ(logit), taken in float32 (float64 in float64)."""
    return (logit if logit.dtype == torch.float64 else logit.float()).sigmoid()


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Sizes of one attention layer, counted as its Transformer twin counts them.

    `num_heads` and `num_kv_heads` are the twin's query and key-value heads and `head_dim` the twin's width of one
    head, whatever the variant makes of them, so two layers that differ only in their variant have the same shape.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_idx: int = 0

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_heads", "num_kv_heads", "head_dim"):
            check_whole(name, getattr(self, name))
        check_whole("layer_idx", self.layer_idx, 0)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}), "
                "so that every key-value head serves equally many query heads"
            )


@dataclass(frozen=True, slots=True)
class Widths:
    """What a variant asks of the layer around it.

    `q`, `k`, `v` are output widths of the projections, `o` the input width of the output projection; the rest is
    what the variant's streams look like once split. `heads` are those of the mixed output, and of every stream unless
    `stream_heads` gives each stream its own number: grouped differential attention has fewer noise heads than signal
    heads. Each must be a multiple of `kv_heads`, and head h of a stream of n reads group h // (n // kv_heads).
    """

    q: int
    k: int
    v: int
    o: int
    heads: int
    kv_heads: int
    query_streams: int
    key_streams: int
    key_width: int
    value_width: int
    stream_heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.stream_heads is None:
            return
        if len(self.stream_heads) != self.query_streams:
            raise ValueError(
                f"stream_heads has {len(self.stream_heads)} numbers; expected query_streams "
                f"({self.query_streams}), one a stream"
            )
        for count in self.stream_heads:
            check_whole("each number in stream_heads", count)
            if count % self.kv_heads:
                raise ValueError(
                    f"stream_heads {self.stream_heads}: {count} is not a multiple of kv_heads ({self.kv_heads})"
                )

    @property
    def query_heads(self) -> tuple[int, ...]:
        """Query heads of each stream."""
        return self.stream_heads or (self.heads,) * self.query_streams

    def share(self, parts: int) -> "Widths":
        """One of `parts` equal shares: whole key-value heads with every query head that reads them.

        ValueError where there are not as many for each.
        """
        if self.kv_heads % parts:
            raise ValueError(f"{parts} does not divide {self.kv_heads}, the number of key-value heads")
        names = ("q", "k", "v", "o", "heads", "kv_heads")
        counts = self.stream_heads
        return replace(
            self,
            **{name: getattr(self, name) // parts for name in names},
            stream_heads=None if counts is None else tuple(count // parts for count in counts),
        )


def twin_widths(shape: HeadShape) -> Widths:
    """What the Transformer twin itself asks for: one stream, keys and values of width head_dim."""
    heads, groups, width = shape.num_heads, shape.num_kv_heads, shape.head_dim
    return Widths(
        q=heads * width,
        k=groups * width,
        v=groups * width,
        o=heads * width,
        heads=heads,
        kv_heads=groups,
        query_streams=1,
        key_streams=1,
        key_width=width,
        value_width=width,
    )


@dataclass(frozen=True, slots=True)
class Streams:
    """Streams of one layer: ordinary grouped-query softmax problems over the same key-value heads.

    q: one (B, H, L, D) per stream; streams may have different numbers of heads, each a multiple of G.
    k: one (B, G, S, D) per stream, or a single one that all streams share.
    v: (B, G, S, E), shared.          gate: broadcastable to (B, H, L, 1), what `mix` weighs the second stream with,
        or None.
    table: (B or 1, S, D) in float32 where keys are held at half their width, k (B, G, S, D/2): a key then is
        (k ∘ first half of the table's row, k ∘ second half). `expanded` multiplies them out.
    held: the codes of the first keys and values, which k and v then continue. S counts both.
    gate_logit: what the gate is the sigmoid of, in place of the gate, for a backend that says `takes_logits`; `closed`
        takes it.
    norm: what the mixed output is normed with, for a kernel that said it would (`Kernel.norms`).
    """

    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: Tensor
    gate: Tensor | None = None
    table: Tensor | None = None
    held: Held | None = None
    gate_logit: Tensor | None = None
    norm: HeadNorm | None = None

    @property
    def keys(self) -> int:
        """S: how many keys there are."""
        return self.v.shape[2] + (0 if self.held is None else self.held.tokens)

    @property
    def shares_keys(self) -> bool:
        return len(self.k) == 1

    @property
    def own_keys(self) -> tuple[Tensor, ...]:
        """The keys of each stream, the shared ones repeated."""
        return self.k * len(self.q) if self.shares_keys else self.k

    def closed(self) -> "Streams":
        """The same with the gate itself, taken in float32 (float64 in float64)."""
        if self.gate_logit is None:
            return self
        return replace(self, gate=closed_gate(self.gate_logit), gate_logit=None)

    def expanded(self) -> "Streams":
        """The same with keys of full width and no table."""
        if self.table is None:
            return self
        first, second = self.table[:, None].chunk(2, dim=-1)
        keys = tuple(torch.cat((k * first, k * second), dim=-1).to(k.dtype) for k in self.k)
        return replace(self, k=keys, table=None)

    def packed_keys(self) -> Tensor:
        """(B, G, S, K·D): the streams' keys side by side, the one layout a cache ever sees."""
        return self.k[0] if self.shares_keys else torch.cat(self.k, dim=-1)

    def with_cached(self, keys: Tensor, values: Tensor, held: Held | None = None) -> "Streams":
        """These queries against keys (B, G, S, K·D) and values (B, G, S, E) that came back from a cache, behind
        `held`."""
        streams = (keys,) if self.shares_keys else keys.chunk(len(self.k), dim=-1)
        return replace(self, k=tuple(streams), v=values, held=held)

    def piece(self, first: int, k: tuple[Tensor, ...], v: Tensor) -> "Streams":
        """The same queries against some keys and values, whose table begins at key `first`."""
        table = None if self.table is None else self.table[:, first : first + v.shape[2]]
        return replace(self, k=k, v=v, table=table, held=None)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads·D) -> (B, heads, N, D)."""
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H·D)."""
    batch, heads, length, width = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * width)


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """(B, G, S, D) -> (B, H, S, D), head h reading group h // (H // G)."""
    batch, groups, length, width = x.shape
    if groups == heads:
        return x
    return (
        x[:, :, None]
        .expand(batch, groups, heads // groups, length, width)
        .reshape(batch, heads, length, width)
    )
