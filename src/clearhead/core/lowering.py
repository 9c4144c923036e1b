"""Rewriting a variant's streams into calls an engine can take, once, for all variants and engines.

A stream is softmax(q kᵀ) v with values as wide as the variant likes. What an engine refuses is rewritten without
changing the maths:

    direct                  one stream, one call
    grouped                 streams that share keys become extra query heads of the same group, one call (DIFF V2);
        "grouped padded" where the value is wider than the key
    FlashDiffAttn_1         one call a stream with the wide value, V read once a stream
    FlashDiffAttn_1 padded  the same with q and k zero-padded to the value's width (logits unchanged)
    FlashDiffAttn_2         one call a stream and slice of the value, each slice as wide as the key
    stacked                 FlashDiffAttn_2 in one call: streams and slices side by side as heads, for engines that
        take one call a layer

The names FlashDiffAttn_1 and FlashDiffAttn_2 are those of the Differential Transformer's released code.
Legend: B batch, H query heads, G key-value heads, L queries, S keys, D key width, E value width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.core.streams import Streams, Widths

WideValues = Literal["native", "pad", "split"]


@dataclass(frozen=True, slots=True)
class Lowering:
    """How streams become calls: `slices` cuts the value, `stack` makes one call, `pad` widens q and k.

    stream_heads: query heads of each stream where they are not equally many, else None.
    """

    name: str
    streams: int
    stack: bool = False
    slices: int = 1
    pad: bool = False
    shares_keys: bool = False
    stream_heads: tuple[int, ...] | None = None

    @property
    def calls(self) -> int:
        return 1 if self.stack else self.streams * self.slices

    @property
    def heads_factor(self) -> int:
        """Query heads of one call over query heads of one stream, where all streams have equally many."""
        return self.streams * self.slices if self.stack else 1


@dataclass(frozen=True, slots=True)
class SoftmaxCall:
    """One grouped-query softmax attention: q (B, H, L, D), k (B, G, S, D), v (B, G, S, E).

    layer_idx: the layer's place in the stack, for functions that look at it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layer_idx: int = 0


@dataclass(frozen=True, slots=True)
class OneCall:
    """A layer as one call of plain heads: what an engine that keeps keys by layer is handed.

    query_heads, kv_heads: of the call.     width: of its queries, keys and values.
    """

    lowering: Lowering
    query_heads: int
    kv_heads: int
    width: int

    @property
    def groups(self) -> int:
        """Query heads that one key-value head serves."""
        return self.query_heads // self.kv_heads


def one_call(sizes: Widths) -> OneCall | str:
    """How streams of these sizes become one call with values as wide as keys; the reason where they cannot."""
    streams, uneven = sizes.query_streams, sizes.stream_heads
    lowering = lower_for(
        streams, sizes.key_streams == 1, sizes.key_width, sizes.value_width, "split", True, uneven
    )
    if isinstance(lowering, str):
        return lowering
    copies = 1 if lowering.shares_keys else streams * lowering.slices
    queries = sum(sizes.query_heads) * lowering.slices
    return OneCall(lowering, queries, copies * sizes.kv_heads, sizes.key_width)


def lower_for(
    streams: int,
    shares_keys: bool,
    key_width: int,
    value_width: int,
    wide_values: WideValues,
    one_call: bool = False,
    stream_heads: tuple[int, ...] | None = None,
) -> Lowering | str:
    """The lowering for an engine that treats values wider than keys as `wide_values` and may insist on `one_call`.

    stream_heads: query heads of each stream where they are not equally many.
    Returns the reason as a string where there is none.
    """
    narrow = value_width <= key_width or wide_values == "native"
    pads = not narrow and wide_values == "pad"
    if shares_keys and streams > 1 and (narrow or pads):
        name = "grouped padded" if pads else "grouped"
        return Lowering(name, streams, stack=True, pad=pads, shares_keys=True, stream_heads=stream_heads)
    if streams == 1 and (narrow or pads):
        return Lowering("direct padded" if pads else "direct", 1, pad=pads, shares_keys=True)
    if not (narrow or pads) and value_width % key_width:
        return f"the value is {value_width} wide, no multiple of the key's {key_width}, so it cannot be cut into slices"
    slices = 1 if narrow or pads else value_width // key_width
    if one_call and stream_heads is not None:
        return (
            f"it takes one call a layer, where streams with {_and(stream_heads)} heads cannot lie side by side: every "
            "key head of a call serves equally many query heads"
        )
    if one_call:
        return Lowering("stacked", streams, stack=True, slices=slices, pad=pads)
    if narrow or pads:
        name = "FlashDiffAttn_1 padded" if pads else "FlashDiffAttn_1"
        return Lowering(name, streams, pad=pads, stream_heads=stream_heads)
    return Lowering("FlashDiffAttn_2", streams, slices=slices, stream_heads=stream_heads)


def _and(counts: Sequence[int]) -> str:
    return f"{', '.join(map(str, counts[:-1]))} and {counts[-1]}"


def lower(heads: Streams, lowering: Lowering, layer_idx: int = 0) -> list[SoftmaxCall]:
    """The calls that compute the streams of `heads`, of the layer at `layer_idx`."""
    queries, keys = heads.q, heads.k if lowering.shares_keys else heads.own_keys
    if lowering.pad:
        extra = heads.v.shape[-1] - queries[0].shape[-1]
        queries = tuple(F.pad(q, (0, extra)) for q in queries)
        keys = tuple(F.pad(k, (0, extra)) for k in keys)
    values = heads.v.chunk(lowering.slices, dim=-1)
    if not lowering.stack:
        return [SoftmaxCall(q, k, v, layer_idx) for q, k in zip(queries, keys, strict=True) for v in values]
    if lowering.shares_keys:
        return [SoftmaxCall(stack_heads(queries, heads.v.shape[1]), keys[0], values[0], layer_idx)]
    # (B, streams·slices·G, S, ·): stream-major, slices inside, so each (stream, slice) is its own block of groups.
    q = torch.cat([q for q in queries for _ in values], dim=1)
    k = torch.cat([k for k in keys for _ in values], dim=1)
    v = torch.cat([v for _ in keys for v in values], dim=1)
    return [SoftmaxCall(q, k, v, layer_idx)]


def unlower_streams(outputs: Sequence[Tensor], lowering: Lowering, groups: int) -> tuple[Tensor, ...]:
    """Outputs of the calls, (B, heads, L, width), back as one (B, H, L, E) a stream, H the stream's own."""
    if not lowering.stack:
        parts = [tuple(outputs[i : i + lowering.slices]) for i in range(0, len(outputs), lowering.slices)]
    elif lowering.shares_keys:
        return unstack_heads(outputs[0], groups, lowering)
    else:
        blocks = outputs[0].chunk(lowering.streams * lowering.slices, dim=1)
        parts = [blocks[i : i + lowering.slices] for i in range(0, len(blocks), lowering.slices)]
    return tuple(part[0] if len(part) == 1 else torch.cat(part, dim=-1) for part in parts)


def unlower_maps(maps: Sequence[Tensor], lowering: Lowering, groups: int) -> tuple[Tensor, ...]:
    """Maps of the calls, (B, heads, L, S), as one (B, H, L, S) a stream; slices of one stream share theirs."""
    if lowering.stack and lowering.shares_keys:
        return unstack_heads(maps[0], groups, lowering)
    flat = maps[0].chunk(lowering.streams * lowering.slices, dim=1) if lowering.stack else maps
    return tuple(flat[:: lowering.slices])


def stack_heads(streams: Sequence[Tensor], groups: int) -> Tensor:
    """One (B, H, L, D) a stream -> (B, sum of H, L, D), the heads of one key-value group together."""
    grouped = [x.unflatten(1, (groups, -1)) for x in streams]
    return torch.cat(grouped, dim=2).flatten(1, 2)


def unstack_heads(x: Tensor, groups: int, lowering: Lowering) -> tuple[Tensor, ...]:
    """The inverse of `stack_heads`."""
    grouped, counts = x.unflatten(1, (groups, -1)), lowering.stream_heads
    if counts is None:
        parts = grouped.chunk(lowering.streams, dim=2)
    else:
        parts = grouped.split([count // groups for count in counts], dim=2)
    return tuple(part.flatten(1, 2) for part in parts)


def lower_mask(mask: Tensor, lowering: Lowering, groups: int) -> Tensor:
    """A (B, H or 1, L, S) mask of the streams' heads for the heads of one call."""
    if mask.shape[1] == 1 or lowering.heads_factor == 1:
        return mask
    if lowering.shares_keys:
        return stack_heads([mask] * lowering.streams, groups)
    return mask.repeat(1, lowering.heads_factor, 1, 1)


def lower_slopes(slopes: Tensor, lowering: Lowering, groups: int) -> Tensor:
    """(H,) numbers of the streams' heads for the heads of one call: streams and slices of a head share its number."""
    if lowering.stack and lowering.shares_keys:
        return stack_heads([slopes[None, :, None, None]] * lowering.streams, groups).flatten()
    return slopes.repeat(lowering.heads_factor)
