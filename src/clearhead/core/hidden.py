"""What is not finite reaches the queries that see it and no other, whichever engine runs.

An engine gives a hidden key the weight zero, and 0 · NaN is NaN: so a NaN in a later token, or in another document,
would come through, by blocks whose size depends on length and dtype. Where padding hides a key it hides it from
everyone, and zeros are put there. What is hidden from some only is looked for, where looking costs nothing but a sum (a
CPU, no graph being made), and such a sequence is written out here.

Legend: B batch, H query heads, L queries, S keys, E value width.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams, repeat_kv

_HIDES = frozenset({"causal", "window", "documents", "dense", "bias"})
_ROWS = 256  # queries at a time, so that memory stays linear in the length


def hides_real_keys(mask: MaskSpec, queries: int, keys: int) -> bool:
    """Whether a key that is no padding may be hidden from a query, which the last token's own step does not do."""
    hides = mask.features & _HIDES
    last = queries == 1 and mask.ends_aligned(queries, keys)
    return bool(hides - {"causal"} if last else hides)


def readable(x: Tensor) -> bool:
    """Whether looking at values stalls no device and breaks no graph."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and type(x) in (Tensor, nn.Parameter)
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def all_finite(heads: Streams) -> bool:
    """Whether no key or value is NaN or infinite; then a weight of zero is enough to hide one.

    A sum that overflows is taken for infinite, which costs time and no correctness.
    """
    for x in (*heads.k, heads.v):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if not math.isfinite(x.detach().sum(dtype=wide).item()):
            return False
    return True


def spoilt_sequences(heads: Streams) -> Tensor:
    """(B, 1, 1, 1) bool: the sequences that hold a key or value that is not finite."""
    fine = [x.isfinite().flatten(1).all(1) for x in (*heads.k, heads.v)]
    return ~torch.stack(fine).all(0)[:, None, None, None]


def without(heads: Streams, hidden: Tensor) -> Streams:
    """Zeros for keys and values where `hidden`, bool that broadcasts to them."""
    keys = tuple(k.masked_fill(hidden, 0.0) for k in heads.k)
    return replace(heads, k=keys, v=heads.v.masked_fill(hidden, 0.0))


def isolated(heads: Streams, mask: MaskSpec, scale: float) -> list[tuple[Tensor, Tensor]]:
    """(B, H, L, E) and the map (B, H, L, S) of each stream; a row is NaN where it sees a value that is not finite."""
    queries = heads.q[0].shape[2]
    results = []
    for q, k in zip(heads.q, heads.own_keys, strict=True):
        count = q.shape[1]
        v = repeat_kv(heads.v, count)
        parts = [
            _some_rows(q[:, :, first : first + _ROWS], repeat_kv(k, count), v, mask, scale, first, queries)
            for first in range(0, queries, _ROWS)
        ]
        outputs, maps = zip(*parts, strict=True)
        results.append((torch.cat(outputs, 2), torch.cat(maps, 2)))
    return results


def _some_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float, first: int, queries: int
) -> tuple[Tensor, Tensor]:
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, keys = q.shape[2], k.shape[2]
    dense = mask.rows(first, rows, queries, keys).materialise(rows, keys, precision, q.device)
    seen = dense if dense.dtype == torch.bool else dense > float("-inf")
    broken = ~k.isfinite().all(-1)[:, :, None]
    logits = (q @ k.masked_fill(broken.mT, 0.0).mT).to(precision) * scale
    # As they are for whoever sees them. Their gradient is left out, as 0 · NaN would come back by it.
    logits = torch.where(broken & seen, (q @ k.mT).detach().to(precision) * scale, logits)
    if dense.dtype != torch.bool:
        logits = logits + dense.masked_fill(~seen, 0.0)
    hidden = ~seen.expand_as(logits)
    logits, blind = logits.masked_fill(hidden, float("-inf")), hidden.all(-1, keepdim=True)
    weights = logits.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0).to(v.dtype)
    bad = ~v.isfinite()
    reached = (~hidden).to(precision) @ bad.to(precision) > 0
    # A factor and not a filling, so that the gradient is NaN there too.
    return (weights @ v.masked_fill(bad, 0.0)) * torch.where(reached, torch.nan, 1.0).to(v.dtype), weights
