"""Attention over the codes of a quantised cache in plain PyTorch, on any device: some keys at a time become numbers.

Legend: B batch, H query heads of one stream, G key-value heads, L queries, S keys, D key width, E value width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from clearhead.core.attend import difference, single
from clearhead.core.dispatch import AttentionProblem, Kernel
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams, repeat_kv

_MIXES = {1: single, 2: difference}
_MASKS = frozenset({"causal", "window", "padding", "dense", "bias", "alibi", "places"})
PIECE = 1024  # tokens that are numbers at a time


class Blocks(Kernel):
    """Softmax on line over pieces of the keys (Milakov and Gimelshein 2018, arXiv 1805.02867), for a quantised cache
    only.

        m' = max(m, max x),  s' = s e^(m − m') + Σ e^(x − m'),  o' = o e^(m − m') + e^(x − m') v,  out = o / s

    with logits x, sums and outputs in float32 (float64 for float64 queries). Memory: one piece of keys and values as
    numbers, and its logits.
    """

    name = "blocks"
    takes_tables = True
    takes_held = True
    unequal_heads = True

    def refusal(self, problem: AttentionProblem) -> str | None:
        if problem.held_bits is None:
            return "it is for the codes of a quantised cache"
        if problem.needs_maps:
            return "it does not return attention maps"
        if problem.needs_grad:
            return "it has no backward pass: codes have no gradient"
        if problem.mixing not in ("single", "difference"):
            return "it knows one stream, or the difference of two, not another mixing"
        if problem.mask - _MASKS:
            return f"it cannot express a mask with {', '.join(sorted(problem.mask - _MASKS))}"
        if problem.stream_heads is not None and problem.differs_by_head:
            return "a mask or ALiBi's slopes by head need streams with equally many heads"
        return None

    def preferred(self, problem: AttentionProblem) -> bool | None:
        return None

    def run(self, heads: Streams, mask: MaskSpec, scale: float) -> Tensor:
        wide = torch.float64 if heads.v.dtype == torch.float64 else torch.float32
        keys, queries = heads.keys, heads.q[0].shape[2]
        states = [_Row.empty(q, heads.v, wide) for q in heads.q]
        for first, piece in _pieces(heads, wide):
            count = piece.v.shape[2]
            part = mask.columns(first, count, queries, keys)
            seen, bias = part.parts(queries, count, wide, heads.v.device)
            if bias is not None:
                seen = seen & (bias != float("-inf"))
            values = _seen_by_some(piece.v, seen)
            for state, q, k in zip(states, piece.q, piece.own_keys, strict=True):
                logits = q.to(wide) @ repeat_kv(k, q.shape[1]).mT * scale
                state.add(logits if bias is None else logits + bias, values, seen)
        streams = tuple(state.result() for state in states)
        return _MIXES[len(streams)](streams, heads.gate).to(heads.v.dtype)


def _pieces(heads: Streams, wide: torch.dtype) -> Iterator[tuple[int, Streams]]:
    """The queries against some keys and values after the other, as numbers of type `wide`, with their first key."""
    past = 0
    if heads.held is not None:
        past = heads.held.tokens
        for first, part in heads.held.pieces(PIECE):
            keys, values = part.expanded(wide)
            yield first, heads.piece(first, keys, values).expanded()
    for first in range(0, heads.v.shape[2], PIECE):
        keys = tuple(k[:, :, first : first + PIECE].to(wide) for k in heads.k)
        values = heads.v[:, :, first : first + PIECE].to(wide)
        yield past + first, heads.piece(past + first, keys, values).expanded()


def _seen_by_some(v: Tensor, seen: Tensor) -> Tensor:
    """v with zeros where no query sees anything: 0 · NaN is NaN."""
    return v.masked_fill(~seen.any(dim=2).any(dim=1)[:, None, :, None], 0.0)


class _Row:
    """What the keys so far made of every query of a stream: references m, sums s, outputs o."""

    def __init__(self, most: Tensor, total: Tensor, out: Tensor) -> None:
        self.most, self.total, self.out = most, total, out

    @classmethod
    def empty(cls, q: Tensor, v: Tensor, wide: torch.dtype) -> "_Row":
        batch, heads, queries = q.shape[:3]
        size = (batch, heads, queries, 1)
        none = torch.full(size, float("-inf"), dtype=wide, device=q.device)
        zeros = torch.zeros((*size[:3], v.shape[3]), dtype=wide, device=q.device)
        return cls(none, torch.zeros(size, dtype=wide, device=q.device), zeros)

    def add(self, logits: Tensor, v: Tensor, seen: Tensor) -> None:
        """Take up the keys of `logits` (B, H, L, S), those that are `seen`, and their values v."""
        # A hidden key may hold NaN, which no addition takes away.
        logits = logits.masked_fill(~seen, float("-inf"))
        most = torch.maximum(self.most, logits.amax(-1, keepdim=True))
        safe = torch.where(most == float("-inf"), 0.0, most)
        keep, weights = (self.most - safe).exp(), (logits - safe).exp()
        self.total = self.total * keep + weights.sum(-1, keepdim=True)
        self.out = self.out * keep + weights @ repeat_kv(v, logits.shape[1])
        self.most = most

    def result(self) -> Tensor:
        """A query that saw no key gets zeros."""
        return torch.where(self.total == 0.0, 0.0, self.out / self.total)
