"""Projections and a variant: what every attention layer and the models share.

Legend: B batch, H query heads, G key-value heads, L queries, S keys, D key width, E value width, K key streams.
"""

from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from clearhead.core.attend import Prepared, attend
from clearhead.core.streams import Streams, merge_heads
from clearhead.positions.base import Rotation
from clearhead.variants.base import Variant


class KeyValueCache(Protocol):
    """What a cache must do; Hugging Face's `DynamicCache` and `StaticCache` do.

    One that has codes (`models.QuantisedCache`) also has `hold`, which is then called instead of `update`: with the
    same arguments, it returns the codes of the older tokens, or None, and keys and values of those that follow.
    """

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Add keys (B, G, L, K·D) and values (B, G, L, E) of one layer; return all of that layer's, old and new."""
        ...

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of that layer already in the cache."""
        ...


class ProjectedAttention(nn.Module):
    """Projections and a variant: what the layers here and the models share.

    The projections are called q_proj, k_proj, v_proj and o_proj whatever the variant makes of them.
    """

    def __init__(self, variant: Variant, *, bias: bool = False, context_dim: int | None = None) -> None:
        super().__init__()
        shape, widths = variant.shape, variant.sizes
        context_dim = shape.embed_dim if context_dim is None else context_dim
        self.variant = variant
        self.layer_idx = shape.layer_idx
        self.scale = widths.key_width**-0.5
        self.q_proj = nn.Linear(shape.embed_dim, widths.q, bias=bias)
        self.k_proj = nn.Linear(context_dim, widths.k, bias=bias)
        self.v_proj = nn.Linear(context_dim, widths.v, bias=bias)
        self.o_proj = nn.Linear(widths.o, shape.embed_dim, bias=bias)

    def project(
        self,
        x: Tensor,
        context: Tensor,
        rotation: Rotation,
        cache: KeyValueCache | None = None,
        table: Tensor | None = None,
        *,
        opened: bool = False,
    ) -> Streams:
        """Placed heads: queries of x (B, L, ·), keys and values of context (B, S, ·), behind those in `cache`.

        table: that of `CollinearPlacement` for all keys, old and new, where the cache holds keys at half their width.
        opened: the gate's logit in place of the gate where it is a sigmoid, for a backend that `takes_logits`.
        """
        split = self.variant.split_open if opened else self.variant.split
        heads = split(self.q_proj(x), self.k_proj(context), self.v_proj(context), x)
        if cache is None:
            return self.variant.place(heads, rotation)
        heads = (
            self.variant.place(heads, rotation) if table is None else self._compact(heads, rotation, table)
        )
        hold = getattr(cache, "hold", None)
        if hold is not None:
            held, keys, values = hold(heads.packed_keys(), heads.v, self.layer_idx)
            return heads.with_cached(keys, values, held)
        return heads.with_cached(*cache.update(heads.packed_keys(), heads.v, self.layer_idx))

    def _compact(self, heads: Streams, rotation: Rotation, table: Tensor) -> Streams:
        placement = self.variant.placement
        assert placement is not None
        queries = tuple(placement.query_for_table(q, rotation) for q in heads.q)
        return replace(
            heads, q=queries, k=tuple(placement.held_key(k, rotation) for k in heads.k), table=table
        )

    def combine(
        self, heads: Streams, prepared: Prepared, with_maps: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output (B, L, embed_dim) and, if asked, its effective map (B, H, L, S)."""
        norm = self.variant.finishing_norm()
        normed = prepared.norms(norm, heads)
        if normed:
            heads = replace(heads, norm=norm)
        output, maps = attend(heads, prepared, self.scale, self.variant.mix, with_maps, self.layer_idx)
        return self.close(output, normed), maps

    def close(self, mixed: Tensor, finished: bool = False) -> Tensor:
        """(B, H, L, E), the streams' mixed output, to the layer's (B, L, embed_dim)."""
        out: Tensor = self.o_proj(merge_heads(mixed if finished else self.variant.finish(mixed)))
        return out
