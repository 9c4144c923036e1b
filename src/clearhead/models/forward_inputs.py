"""What one forward pass of a model is about: its mask, its positions, the lengths of its requests.

Legend: B batch, L queries, S keys.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from clearhead.core.masks import MaskSpec, packed_documents, snapshot_length
from clearhead.core.parts import rows_are_shared
from clearhead.core.values import demand, readable
from clearhead.models.arguments import (
    check_dense,
    check_mask_shape,
    check_position_ids,
    has_padding,
)
from clearhead.models.parts import check_part, check_part_length
from clearhead.models.places import places_behind, places_of_dense, places_of_row, restarts
from clearhead.positions.base import Position
from clearhead.positions.length import (
    check_cached_length,
    check_given_length,
    given_length,
    longest_request,
)


@dataclass(frozen=True, slots=True)
class Placed:
    """The mask of a forward pass, the positions (B or 1, L) of its queries, and the number of keys it will see.

    past:   how many of the keys were there before: a tensor in a cache of fixed size, None without a cache.
    places: `MaskSpec.places`, for layers whose logits depend on distances.
    """

    mask: MaskSpec
    positions: Tensor
    keys: int
    past: int | Tensor | None
    places: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What a forward pass was given beside its tokens, as it was given."""

    attention_mask: Tensor | None
    position_ids: Tensor | None
    rope_length: int | Tensor | None
    cache: Cache | None
    kwargs: Mapping[str, Any]

    @property
    def told(self) -> bool:
        """Whether anything says how long the rows are."""
        return any(x is not None for x in (self.attention_mask, self.position_ids, self.rope_length))


def place(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    packed: Tensor | None = None,
    distances: bool = False,
    layer: int = 0,
    causal: bool = True,
) -> Placed:
    """What `ClearheadModel.forward` says about its arguments, in one value.

    packed:    (B or 1, L) document numbers that were given as such.
    distances: whether a layer asks for `Placed.places`.
    layer:     whose cache has every key, where one has. Windows are left to the layers that have them.
    causal:    whether a query sees no later key.
    On an accelerator one value is waited for at most, whether anything is padded, or packed; none behind a cache, where
    a mask counts as one with padding, and none for documents that were given as such.
    """
    batch, queries = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    known = None if cache is None else snapshot_length(cache.get_seq_length(layer))
    past = 0 if known is None else known
    fresh = isinstance(past, int) and past == 0
    keys = queries if cache is None else sum(cache.get_mask_sizes(queries, layer))
    check_position_ids(position_ids, batch, queries)
    slots = (torch.arange(queries, device=device) + past)[None]
    if rows_are_shared():
        own = check_part(attention_mask, position_ids, packed, whole=fresh and keys == queries)
        return Placed(MaskSpec(is_causal=causal, offset=past), own, keys, known)
    if packed is not None:
        if not fresh:
            raise ValueError("packed documents cannot extend a cache: cached keys carry no document numbers")
        if position_ids is None:
            position_ids = _counted_within(packed)
    if attention_mask is not None and attention_mask.ndim == 4:
        check_dense(attention_mask, batch, queries, keys)
        where = slots if position_ids is None else position_ids
        places = None
        if distances and position_ids is not None:
            places = places_of_dense(position_ids, slots, keys, fresh)
        return Placed(MaskSpec(dense=attention_mask[..., :keys]), where, keys, known, places)

    real, padding, documents = None, None, None
    if attention_mask is not None:
        check_mask_shape(attention_mask, batch, queries, past, _held(cache, queries, keys))
        real = _fit(attention_mask != 0, batch, keys)
    if fresh and position_ids is not None:
        documents = _documents(position_ids.expand(batch, -1), real, packed)
    # Looking costs nothing on a CPU, and may save a mask.
    free = device.type == "cpu"
    if attention_mask is not None:
        look = fresh or free
        padded, documents = has_padding(attention_mask, documents, look)
        padding = real if padded else None
    elif documents is not None and (free or packed is None) and not _several(documents):
        documents = None
    if position_ids is not None and not fresh and queries > 1:
        again = restarts(position_ids, None if padding is None else _own(padding, past, queries))
        demand(~again.any(), _RESTARTS_BEHIND)

    counted = None if padding is None else (padding.long().cumsum(dim=-1) - 1).clamp(min=0)
    # Real tokens are counted, so that left padding moves nothing: slack collinear attention would notice.
    own = slots if counted is None else _own(counted, past, queries)
    positions = own if position_ids is None else position_ids
    if documents is not None:
        documents = F.pad(documents, (0, keys - queries))
    places = None
    if distances and fresh and real is not None and (padding is not None or position_ids is not None):
        places = places_of_row(positions, real, documents, keys)
    elif distances and not fresh:
        places = places_behind(positions, counted, padding, slots, keys, position_ids is not None)
    mask = MaskSpec(is_causal=causal, offset=past, key_padding=padding, documents=documents)
    return Placed(mask, positions, keys, known, places)


def _several(documents: Tensor) -> bool:
    """Whether there is more than one in a row; yes where nobody may look."""
    return not readable(documents) or bool((documents > 1).any())


def _held(cache: Cache | None, queries: int, keys: int) -> int:
    """The keys of the layer that has most: a mask may be that wide. It may be in another stage of a pipeline."""
    layers = 0 if cache is None else len(getattr(cache, "layers", ()))
    return max([keys, *(sum(cache.get_mask_sizes(queries, i)) for i in range(layers) if cache is not None)])


_RESTARTS_BEHIND = (
    "position_ids restart in a call that extends a cache: cached keys carry no document numbers, so give packed "
    "documents without past_key_values, or a mask of 4 dimensions"
)


def _documents(position_ids: Tensor, real: Tensor | None, packed: Tensor | None) -> Tensor:
    """(B, L) document numbers from 1 on. Under a mask only positions that go back begin one: gaps may be padding."""
    numbers = packed_documents(position_ids)
    if real is not None:
        numbers = 1 + restarts(position_ids, real[:, : position_ids.shape[1]]).cumsum(dim=1)
    if packed is not None:
        numbers = numbers + F.pad(packed.diff(dim=1) != 0, (1, 0)).cumsum(dim=1)
    return numbers


def _counted_within(packed: Tensor) -> Tensor:
    """(B or 1, L): places counted from 0 within each run of equal numbers."""
    slots = torch.arange(packed.shape[1], device=packed.device)
    starts = F.pad(packed.diff(dim=1) != 0, (1, 0), value=True)
    return slots - torch.where(starts, slots, 0).cummax(dim=1).values


def key_positions(placed: Placed) -> Tensor:
    """(B or 1, S): the positions of all keys, counted over real tokens as `place` counts those of the queries.

    Packed documents, which no later call extends, keep the positions they came with. ValueError for other positions
    that were given and are not what counting gives.
    """
    queries = placed.positions.shape[1]
    if placed.mask.documents is not None:
        return F.pad(placed.positions, (0, placed.keys - queries))
    padding, device = placed.mask.key_padding, placed.positions.device
    if padding is None:
        positions = torch.arange(placed.keys, device=device)[None]
    else:
        positions = (padding.long().cumsum(dim=-1) - 1).clamp(min=0)
    past = 0 if placed.past is None else placed.past
    wrong = _own(positions, past, queries) != placed.positions
    if padding is not None:
        wrong = wrong & _own(padding, past, queries)
    demand(
        ~wrong.any(),
        "position_ids do not count the real tokens from 0; a compact cache counts positions itself, "
        "so leave them out or set compact_cache=False",
    )
    return positions


def depends_on_length(methods: Iterable[Position]) -> bool:
    """Whether any of a model's position methods has to know how long a request is."""
    return any(method.depends_on_length for method in methods)


def shortest_trained_length(methods: Iterable[Position]) -> int | None:
    """The length up to which none of them looks at the length; None where one always does."""
    lengths = [method.trained_length for method in methods if method.depends_on_length]
    known = [length for length in lengths if length is not None]
    return min(known) if known and len(known) == len(lengths) else None


def request_lengths(
    methods: Iterable[Position],
    rope_length: int | Tensor | None,
    placed: Placed,
    batch: int,
    cache: Cache | None = None,
) -> Tensor | None:
    """(B or 1, 1), or (B, L) in packed rows: the length of each row's or token's request; None if nobody asks.

    ValueError for a rope_length that is no length or shorter than the request, for a cache that needs one, and for one
    that was written with another.
    """
    methods = list(methods)
    if not depends_on_length(methods):
        return None
    positions, mask = placed.positions, placed.mask
    past = 0 if placed.past is None else placed.past
    documents = None if mask.documents is None else mask.documents[:, : positions.shape[1]]
    real = None if mask.key_padding is None else _own(mask.key_padding, past, positions.shape[1])
    longest = longest_request(positions, documents, real)
    if rope_length is not None:
        length = given_length(rope_length, batch, positions.device)
        check_given_length(length, longest)
    else:
        if placed.past is not None:
            check_cached_length(shortest_trained_length(methods), placed.past, placed.keys)
        if rows_are_shared():
            check_part_length(longest, shortest_trained_length(methods))
        # Behind a cache this is too short, but all lengths that pass the check are within the trained one.
        length = longest
    if cache is not None:
        _keep_length(cache, length, shortest_trained_length(methods), past)
    return length


def _keep_length(cache: Cache, length: Tensor, trained: int | None, past: int | Tensor) -> None:
    """Notes on a cache the length that its keys were turned by; ValueError if they were turned by another one."""
    if not readable(length) or (isinstance(past, Tensor) and past.device.type != "cpu"):
        return
    # Up to the trained length all are alike.
    length = length if trained is None else length.clamp(min=trained)
    held = getattr(cache, "_rope_length", None) if int(past) > 0 else None
    if held is not None and (held.shape == length.shape or 1 in (len(held), len(length))):
        demand(
            (held.to(length.device) == length).all(),
            "rope_length differs from the one that the cache was written with: this rope scaling turns keys by it, so "
            "give every call on a cache the same, from the first one on",
        )
    else:
        cache._rope_length = length  # type: ignore[attr-defined]


def _own(x: Tensor, past: int | Tensor, queries: int) -> Tensor:
    """(B, S) -> (B, L): the columns of the queries."""
    if isinstance(past, Tensor):
        return x.index_select(1, torch.arange(queries, device=x.device) + past)
    return x[:, past : past + queries]


def _fit(mask: Tensor, batch: int, keys: int) -> Tensor:
    """(B, S) for a cache of `keys` positions: cut, or continued with what is not written yet."""
    missing = keys - mask.shape[1]
    if missing > 0:
        mask = F.pad(mask, (0, missing), value=False)
    return mask[:, :keys].expand(batch, -1)
