"""Attention layers for anyone's model.

Legend: B batch, H query heads, G key-value heads, L queries, S keys, D key width, E value width, K key streams.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from clearhead.core.attend import Prepared, attend, prepare, problem_of
from clearhead.core.dispatch import automatic_backends, load_backend
from clearhead.core.heads import Heads, HeadShape, merge_heads
from clearhead.core.masks import MaskSpec, written
from clearhead.positions.base import Position, Rotation
from clearhead.positions.nope import Nope
from clearhead.positions.rope import Rope
from clearhead.variants.base import Variant
from clearhead.variants.collinear import Activation, Collinear, Mode
from clearhead.variants.differential import Differential
from clearhead.variants.differential_v2 import DifferentialV2
from clearhead.variants.softmax import Softmax

__all__ = [
    "Attention",
    "AttentionCore",
    "CollinearAttention",
    "DifferentialAttention",
    "DifferentialAttentionV2",
]

PositionName = Literal["rope", "nope"]


class KeyValueCache(Protocol):
    """What a cache must do; Hugging Face's `DynamicCache` and `StaticCache` do."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Add keys (B, G, L, K·D) and values (B, G, L, E) of one layer; return all of that layer's, old and new."""
        ...

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of that layer already in the cache."""
        ...


class AttentionCore(nn.Module):
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
        self, x: Tensor, context: Tensor, rotation: Rotation, cache: KeyValueCache | None = None
    ) -> Heads:
        """Placed heads: queries of x (B, L, ·), keys and values of context (B, S, ·), behind those in `cache`."""
        heads = self.variant.split(self.q_proj(x), self.k_proj(context), self.v_proj(context), x)
        heads = self.variant.place(heads, rotation)
        if cache is None:
            return heads
        return heads.with_cached(*cache.update(heads.packed_keys(), heads.v, self.layer_idx))

    def combine(
        self, heads: Heads, prepared: Prepared, with_maps: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output (B, L, embed_dim) and, if asked, its effective map (B, H, L, S)."""
        output, maps = attend(heads, prepared, self.scale, self.variant.mix, with_maps)
        return self.o_proj(merge_heads(self.variant.finish(output))), maps


class Attention(AttentionCore):
    """Self- or cross-attention with softmax maps, and the base of the layers below.

    softmax(q kᵀ / √D) v with `num_heads` query heads of width `head_dim` over `num_kv_heads` key-value heads
    (grouped-query; Vaswani et al. 2017, Ainslie et al. 2023). `num_heads`, `num_kv_heads` and `head_dim` count as
    for the Transformer that the layer replaces, in every subclass too.

    embed_dim:    width of x and of the output.        context_dim: width of `context`, by default embed_dim.
    layer_idx:    place in the stack from 0; which layer of a cache is this one's, and λ_init's argument.
    position:     "rope" or "nope"; rope_theta is RoPE's base.
    head_norm:    RMSNorm on each head's output (a control, see `variants.softmax.Softmax`).
    backend:      "auto", or the name of an engine or kernel, which is then used or raises with its reason.
    Raises ValueError for sizes that do not fit, naming the argument.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        context_dim: int | None = None,
        bias: bool = False,
        position: PositionName = "rope",
        rope_theta: float = 10000.0,
        head_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        shape = _shape(embed_dim, num_heads, num_kv_heads, head_dim, layer_idx)
        self._build(Softmax(shape, head_norm=head_norm), bias, context_dim, position, rope_theta, backend)

    def _build(
        self,
        variant: Variant,
        bias: bool,
        context_dim: int | None,
        position: str,
        rope_theta: float,
        backend: str,
    ) -> None:
        AttentionCore.__init__(self, variant, bias=bias, context_dim=context_dim)
        self.position = _position(position, variant.shape.head_dim, rope_theta)
        if variant.needs_rotation and not self.position.rotates:
            raise ValueError(
                f'{type(self).__name__} is defined by RoPE\'s angles: position must be "rope", not {position!r}'
            )
        self.automatic = backend == "auto"
        self.backends = automatic_backends() if self.automatic else (load_backend(backend),)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        documents: Tensor | None = None,
        window: int | None = None,
        attn_mask: Tensor | None = None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x (B, L, embed_dim) -> (B, L, embed_dim).

        context:           (B, S, context_dim) for cross-attention; by default x itself.
        is_causal:         a query sees keys up to its own position; with fewer queries than keys they are the last
            ones.
        key_padding_mask:  (B, S) bool, True where a key is real; S counts cached keys too.
        documents:         (B, L) integers; tokens see their own document only. Not together with a cache.
        window:            a query sees keys fewer than this many tokens away, whatever `positions` say: under is_causal
            the last `window`, its own among them, otherwise as many to either side.
        attn_mask:         (L, S) or (B, H, L, S), where a 1 stands for any size: bool, True = visible, or floating
            point, added to the scaled logits.
        positions:         (B or 1, L) integers, by default counted from 0 or from the cache's end; context_positions
            alike for S.
        cache:             a key-value cache in Hugging Face's protocol, updated in place.
        A query that sees no key gets zeros from the attention. Raises ValueError for masks that do not fit.
        """
        masks = (is_causal, key_padding_mask, documents, window, attn_mask)
        return self._run(x, context, *masks, positions, context_positions, cache, with_maps=False)[0]

    def effective_map(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        documents: Tensor | None = None,
        window: int | None = None,
        attn_mask: Tensor | None = None,
        positions: Tensor | None = None,
        context_positions: Tensor | None = None,
    ) -> Tensor:
        """(B, H, L, S): what each query takes of each value, A1 − λ A2 for DIFF. Arguments as for `forward`."""
        masks = (is_causal, key_padding_mask, documents, window, attn_mask)
        maps = self._run(x, context, *masks, positions, context_positions, None, with_maps=True)[1]
        assert maps is not None
        return maps

    def _run(
        self,
        x: Tensor,
        context: Tensor | None,
        is_causal: bool,
        key_padding_mask: Tensor | None,
        documents: Tensor | None,
        window: int | None,
        attn_mask: Tensor | None,
        positions: Tensor | None,
        context_positions: Tensor | None,
        cache: KeyValueCache | None,
        with_maps: bool,
    ) -> tuple[Tensor, Tensor | None]:
        source = x if context is None else context
        self._check(x, source, documents, cache)
        past = None if cache is None else written(cache.get_seq_length(self.layer_idx))
        if positions is None:
            positions = _counted(x, 0 if past is None or context is not None else past)
        if context is not None and context_positions is None:
            context_positions = _counted(source, 0 if past is None else past)
        _check_positions("positions", positions, x)
        if context_positions is not None:
            _check_positions("context_positions", context_positions, source)
        heads = self.project(x, source, self.position.rotation(positions, context_positions), cache)
        mask = MaskSpec(
            is_causal=is_causal,
            offset=past if context is None else None,
            window=window,
            key_padding=key_padding_mask,
            documents=documents,
            dense=attn_mask,
        )
        mask.validate(x.shape[0], self.variant.sizes.heads, x.shape[1], heads.v.shape[2])
        problem = problem_of(heads, mask, self.variant.mix, with_maps)
        return self.combine(heads, prepare(self.backends, problem, mask, self.automatic), with_maps)

    def _check(
        self, x: Tensor, source: Tensor, documents: Tensor | None, cache: KeyValueCache | None
    ) -> None:
        for name, value, width in (
            ("x", x, self.q_proj.in_features),
            ("context", source, self.k_proj.in_features),
        ):
            if value.ndim != 3 or value.shape[2] != width:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected (batch, tokens, {width})")
            if value.shape[1] == 0:
                raise ValueError(f"{name} has no tokens: its shape is {tuple(value.shape)}")
        if source.shape[0] != x.shape[0]:
            raise ValueError(f"context has batch size {source.shape[0]}, x has {x.shape[0]}")
        if documents is not None and cache is not None:
            raise ValueError(
                "documents cannot be combined with a cache: cached keys carry no document numbers"
            )


class DifferentialAttention(Attention):
    """Differential attention V1: (softmax(q1 k1ᵀ/√D) − λ softmax(q2 k2ᵀ/√D)) v, normed per head, × (1 − λ_init).

    Replaces a Transformer layer of the same `num_heads`, `num_kv_heads` and `head_dim` (both head counts even) at
    the same projection sizes, plus 6 · head_dim parameters: it has num_heads / 2 heads with values 2 · head_dim
    wide. Formula, sources and differences from
    the released code: `variants.differential.Differential`; the other arguments: `Attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        context_dim: int | None = None,
        bias: bool = False,
        position: PositionName = "rope",
        rope_theta: float = 10000.0,
        lambda_init: Literal["depth"] | float = "depth",
        head_norm: bool = True,
        backend: str = "auto",
    ) -> None:
        shape = _shape(embed_dim, num_heads, num_kv_heads, head_dim, layer_idx)
        variant = Differential(shape, lambda_init=lambda_init, head_norm=head_norm)
        self._build(variant, bias, context_dim, position, rope_theta, backend)


class DifferentialAttentionV2(Attention):
    """Differential attention V2: softmax(q_2i kᵀ/√D) v − sigmoid(λ_i(x)) softmax(q_2i+1 kᵀ/√D) v.

    num_heads output heads from 2 · num_heads query heads; keys, values and cache are the Transformer's. Formula,
    sources and differences
    from the released code: `variants.differential_v2.DifferentialV2`; the arguments: `Attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        context_dim: int | None = None,
        bias: bool = False,
        position: PositionName = "rope",
        rope_theta: float = 10000.0,
        backend: str = "auto",
    ) -> None:
        shape = _shape(embed_dim, num_heads, num_kv_heads, head_dim, layer_idx)
        self._build(DifferentialV2(shape), bias, context_dim, position, rope_theta, backend)


class CollinearAttention(Attention):
    """Collinear constrained attention: softmax(Σ_j t_j |q_j|² cos((m − n) θ_j) / √D) v in mode "exact".

    Same parameters as the Transformer layer it replaces; always rotary. The three modes, sources and differences
    from the released code: `variants.collinear.Collinear`; the other arguments: `Attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        context_dim: int | None = None,
        bias: bool = False,
        rope_theta: float = 10000.0,
        mode: Mode = "exact",
        activation: Activation = "relu",
        backend: str = "auto",
    ) -> None:
        shape = _shape(embed_dim, num_heads, num_kv_heads, head_dim, layer_idx)
        self._build(
            Collinear(shape, mode=mode, activation=activation), bias, context_dim, "rope", rope_theta, backend
        )


def _shape(
    embed_dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None, layer_idx: int
) -> HeadShape:
    if head_dim is None:
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim ({embed_dim}) is not a multiple of num_heads ({num_heads}); give head_dim"
            )
        head_dim = embed_dim // num_heads
    return HeadShape(
        embed_dim, num_heads, num_heads if num_kv_heads is None else num_kv_heads, head_dim, layer_idx
    )


def _position(name: str, head_dim: int, rope_theta: float) -> Position:
    if name == "rope":
        return Rope(head_dim, rope_theta)
    if name == "nope":
        return Nope()
    raise ValueError(f'position must be "rope" or "nope", not {name!r}')


def _check_positions(name: str, positions: Tensor, x: Tensor) -> None:
    expected = (x.shape[0], x.shape[1])
    if positions.ndim != 2 or positions.shape[0] not in (1, expected[0]) or positions.shape[1] != expected[1]:
        raise ValueError(
            f"{name} has shape {tuple(positions.shape)}; expected {expected} or (1, {expected[1]})"
        )
    if positions.dtype == torch.bool or positions.is_floating_point():
        raise ValueError(f"{name} must hold integers, not {positions.dtype}")


def _counted(x: Tensor, start: int | Tensor) -> Tensor:
    return (torch.arange(x.shape[1], device=x.device) + start)[None]
