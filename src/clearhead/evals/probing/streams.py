"""What one layer's attention works with, as a recorder sees it.

Legend: B batch, H query heads of one stream, G key-value heads, N tokens, D key width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from clearhead.core.streams import Streams
from clearhead.variants.placement import CollinearPlacement

Pairs = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recorded:
    """One layer's streams in one forward pass, without a cache.

    q: (B, H, N, D) a stream, k: (B, G, N, D) a stream: as the softmax takes them, at their positions.
    scale: of the logits. slopes: (H,) of ALiBi, or None.
    pairs: the first and second components of the pairs that the position method turns, in order of falling frequency;
        None without rotation. It may leave out components that are not turned.
    before: the heads as the projections gave them, where that is known: in this library's models.
    placement: what makes them collinear, if something does.
    window: the keys that a query sees, its own among them; None for all. Not known of other models.
    turned: what the rotation of this pass makes of queries (B or 1, 1, N, D) that stand where its own do, where known.
    """

    layer: int
    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    scale: float
    slopes: Tensor | None = None
    pairs: Pairs | None = None
    before: Streams | None = None
    placement: CollinearPlacement | None = None
    window: int | None = None
    turned: Callable[[Tensor], Tensor] | None = None


Record = Callable[[Recorded], None]
