"""Where tokens stand, for logits that depend on distances: places among the keys, or positions where they differ.

Legend: B batch, L queries, S keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.core.values import demand, readable

Places = tuple[Tensor, Tensor]


def restarts(position_ids: Tensor, real: Tensor | None) -> Tensor:
    """(B, L) bool: real tokens whose position does not go on from that of the real token before them."""
    if real is not None:
        position_ids = position_ids.expand(real.shape[0], -1)
    before = _previous(position_ids, real)
    earlier = position_ids.gather(1, before.clamp(min=0))
    found = (before >= 0) & (position_ids <= earlier)
    return found if real is None else found & real


def places_of_row(positions: Tensor, real: Tensor, documents: Tensor | None, keys: int) -> Places | None:
    """Of a row that is read at once: keys stand where the queries do. None where places among the keys will do."""
    theirs = F.pad(positions, (0, keys - positions.shape[1])).expand(real.shape[0], -1)
    return None if _known(_even(theirs, real, documents)) else (positions, theirs)


def places_of_dense(positions: Tensor, slots: Tensor, keys: int, fresh: bool) -> Places | None:
    """Under a mask of 4 dimensions with given positions. Cached keys count from 0, and the first query follows them."""
    if not fresh:
        demand(
            (positions[:, :1] == slots[:, :1]).all(),
            "position_ids under a mask of 4 dimensions must go on where the cache ends for ALiBi, which has to know "
            "the positions of the cached keys: leave them out, or give all tokens without a cache",
        )
    if _known((positions == slots).all()):
        return None
    if fresh:
        return positions, F.pad(positions, (0, keys - positions.shape[1]))
    theirs = torch.arange(keys, device=positions.device).expand(positions.shape[0], -1)
    return positions, theirs.index_copy(1, slots[0], positions)


def places_behind(
    positions: Tensor, counted: Tensor | None, real: Tensor | None, slots: Tensor, keys: int, given: bool
) -> Places | None:
    """Behind a cache, whose keys count real tokens, or all: as the given positions of the queries do.

    ValueError for positions that do neither.
    """
    theirs = torch.arange(keys, device=positions.device)[None]
    if counted is not None and real is not None:
        theirs = torch.where(_goes_on(positions, theirs, real, slots), theirs, counted) if given else counted
    if given:
        demand(
            _goes_on(positions, theirs, real, slots).all(),
            "position_ids behind a cache must count all tokens so far, or the real ones, for ALiBi, which has to know "
            "the positions of the cached keys: leave them out",
        )
    if real is None or _known(_even(theirs.expand(real.shape[0], -1), real, None)):
        return None
    return positions, theirs


def _goes_on(positions: Tensor, theirs: Tensor, real: Tensor | None, slots: Tensor) -> Tensor:
    """(B or 1, 1) bool: whether the queries' positions are their own keys', padding aside."""
    same = theirs.index_select(1, slots[0]) == positions
    if real is not None:
        same = same | ~real.index_select(1, slots[0])
    return same.all(dim=1, keepdim=True)


def _even(theirs: Tensor, real: Tensor, documents: Tensor | None) -> Tensor:
    """Whether positions of real tokens are as far apart as their places, within each document."""
    shift = theirs - torch.arange(theirs.shape[1], device=theirs.device)
    before = _previous(theirs, real)
    earlier = before.clamp(min=0)
    uneven = real & (before >= 0) & (shift != shift.gather(1, earlier))
    if documents is not None:
        uneven = uneven & (documents == documents.gather(1, earlier))
    return ~uneven.any()


def _previous(x: Tensor, real: Tensor | None) -> Tensor:
    """(B, N): where the last real token before each stands, −1 for none."""
    slots = torch.arange(x.shape[1], device=x.device).expand_as(x)
    if real is not None:
        slots = torch.where(real, slots, -1).cummax(dim=1).values
    return F.pad(slots, (1, -1), value=-1)


def _known(holds: Tensor) -> bool:
    """Whether it holds and can be looked at without waiting for a device."""
    return holds.device.type == "cpu" and readable(holds) and bool(holds)
