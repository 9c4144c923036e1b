"""What one forward pass of a model is about: its mask, its positions, the lengths of its requests.

Legend: B batch, L queries, S keys.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from clearhead.core.masks import MaskSpec, packed_documents, written
from clearhead.positions.base import Position
from clearhead.positions.length import check_cached_length, given_length, longest_request


@dataclass(frozen=True, slots=True)
class Placed:
    """The mask of a forward pass, the positions (B or 1, L) of its queries, and the number of keys it will see.

    past: how many of the keys were there before: a tensor in a cache of fixed size, None without a cache.
    """

    mask: MaskSpec
    positions: Tensor
    keys: int
    past: int | Tensor | None


def place(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    packed_ok: bool,
) -> Placed:
    """What `ClearheadModel.forward` says about its arguments, in one value.

    packed_ok: whether positions that restart mean documents, as in a call that starts no cache of its own.
    """
    batch, queries = inputs_embeds.shape[:2]
    known = None if cache is None else written(cache.get_seq_length())
    past = 0 if known is None else known
    keys = queries if cache is None else cache.get_mask_sizes(queries, 0)[0]
    tracing = torch.compiler.is_compiling()
    if attention_mask is not None and attention_mask.ndim == 4:
        if position_ids is None:
            position_ids = (torch.arange(queries, device=inputs_embeds.device) + past)[None]
        return Placed(MaskSpec(dense=attention_mask[..., :keys]), position_ids, keys, known)
    if position_ids is not None and tuple(position_ids.shape) not in ((1, queries), (batch, queries)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; expected {(batch, queries)} or {(1, queries)}"
        )
    if attention_mask is not None:
        _check_mask(attention_mask, batch, queries, past, keys)
    documents = None
    padding = None
    if attention_mask is not None and (tracing or not bool(attention_mask.all())):
        padding = _fit(attention_mask.bool(), batch, keys)
        if position_ids is None:
            # Real tokens are counted, so that left padding moves nothing: slack collinear attention would notice.
            counted = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
            position_ids = counted[:, -queries:]
    elif position_ids is not None and attention_mask is None and packed_ok:
        numbered = packed_documents(position_ids.expand(batch, -1))
        documents = numbered if tracing or bool((numbered > 1).any()) else None
    if position_ids is None:
        position_ids = (torch.arange(queries, device=inputs_embeds.device) + past)[None]
    mask = MaskSpec(is_causal=True, offset=past, key_padding=padding, documents=documents)
    return Placed(mask, position_ids, keys, known)


def key_positions(placed: Placed) -> Tensor:
    """(B or 1, S): the positions of all keys, counted over real tokens as `place` counts those of the queries.

    Packed documents, which no later call extends, keep the positions they came with. ValueError for other positions
    that were given and are not what counting gives.
    """
    if placed.mask.documents is not None:
        return placed.positions
    padding, device = placed.mask.key_padding, placed.positions.device
    if padding is None:
        positions = torch.arange(placed.keys, device=device)[None]
    else:
        positions = (padding.long().cumsum(dim=-1) - 1).clamp(min=0)
    if not torch.compiler.is_compiling():
        past = 0 if placed.past is None else placed.past
        own = torch.arange(placed.positions.shape[1], device=device) + past
        wrong = positions[:, own] != placed.positions
        if padding is not None:
            wrong = wrong & padding[:, own]
        if bool(wrong.any()):
            raise ValueError(
                "position_ids do not count the real tokens from 0; a compact cache counts positions itself, "
                "so leave them out or set compact_cache=False"
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
    methods: Iterable[Position], rope_length: int | Tensor | None, placed: Placed, batch: int
) -> Tensor | None:
    """(B or 1, 1), or (B, L) in packed rows: the length of each row's or token's request; None if nobody asks.

    ValueError for a rope_length that is no length, and for a cache that needs one.
    """
    methods = list(methods)
    if not depends_on_length(methods):
        return None
    positions, mask = placed.positions, placed.mask
    if rope_length is not None:
        return given_length(rope_length, batch, positions.device)
    if placed.past is not None:
        check_cached_length(shortest_trained_length(methods), placed.past, placed.keys)
    padding = mask.key_padding
    # Behind a cache the mask has more columns than positions, and all lengths are within the trained one.
    real = padding if padding is not None and padding.shape[1] == positions.shape[1] else None
    return longest_request(positions, mask.documents, real)


def _check_mask(mask: Tensor, batch: int, queries: int, past: int | Tensor, keys: int) -> None:
    # How much of a cache of fixed size is written is on its device; asking would stall it.
    least, most = (past + queries,) * 2 if isinstance(past, int) else (queries, keys)
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or not least <= mask.shape[1] <= most:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected 4 dimensions or ({batch}, {most}), "
            "one column for each token so far, those in the cache too"
        )


def _fit(mask: Tensor, batch: int, keys: int) -> Tensor:
    """(B, S) for a cache of `keys` positions: cut, or continued with what is not written yet."""
    missing = keys - mask.shape[1]
    if missing > 0:
        mask = torch.nn.functional.pad(mask, (0, missing), value=False)
    return mask[:, :keys].expand(batch, -1)
