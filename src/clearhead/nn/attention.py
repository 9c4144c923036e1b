"""The attention layer with softmax maps, and the base of those with others.

Legend: B batch, H query heads, G key-value heads, L queries, S keys, D key width, E value width, K key streams.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clearhead.core.attend import prepare, problem_of
from clearhead.core.dispatch import automatic_backends, load_backend
from clearhead.core.heads import HeadShape, check_whole
from clearhead.core.masks import MaskSpec, written
from clearhead.nn.core import AttentionCore, KeyValueCache
from clearhead.positions.base import Position
from clearhead.positions.length import (
    check_cached_length,
    check_given_length,
    given_length,
    longest_request,
)
from clearhead.registry import resolve
from clearhead.variants.base import Variant
from clearhead.variants.softmax import Softmax


class Attention(AttentionCore):
    """Self- or cross-attention with softmax maps, and the base of the layers below.

    softmax(q kᵀ / √D) v with `num_heads` query heads of width `head_dim` over `num_kv_heads` key-value heads
    (grouped-query; Vaswani et al. 2017, Ainslie et al. 2023). `num_heads`, `num_kv_heads` and `head_dim` count as
    for the Transformer that the layer replaces, in every subclass too.

    embed_dim:    width of x and of the output.        context_dim: width of `context`, by default embed_dim.
    layer_idx:    place in the stack from 0; which layer of a cache is this one's, and λ_init's argument.
    position:     a registered position: "rope", "xpos", "alibi", "nope".
    rope_parameters: RoPE's base, scaling and layout as in `ClearheadConfig`, for example {"rope_type": "dynamic",
        "factor": 4.0}; rope_theta=θ is short for {"rope_theta": θ}.
    max_positions: the length trained with, which scalings count from unless `rope_parameters` say it.
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
        position: str = "rope",
        rope_theta: float | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        max_positions: int | None = None,
        head_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        shape = head_shape(embed_dim, num_heads, num_kv_heads, head_dim, layer_idx)
        place = make_position(position, shape.head_dim, rope_theta, rope_parameters, max_positions)
        check_flag("head_norm", head_norm)
        self._build(Softmax(shape, head_norm=head_norm), place, bias, context_dim, backend)

    def _build(
        self, variant: Variant, position: Position, bias: bool, context_dim: int | None, backend: str
    ) -> None:
        check_flag("bias", bias)
        if context_dim is not None:
            check_whole("context_dim", context_dim)
        AttentionCore.__init__(self, variant, bias=bias, context_dim=context_dim)
        self.position = position
        if variant.needs_rotation and not position.rotates:
            raise ValueError(
                f"{type(self).__name__} is defined by rotary angles: position must be one that rotates (rope, xpos), "
                f"not {type(position).__name__.lower()!r}"
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
        rope_length: int | Tensor | None = None,
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
        rope_length:       the length of the whole request in tokens, or (B,) for each row, for rope scalings that
            depend on it (dynamic, longrope); others do not look at it. By default the longest position + 1 of the row
            or document; calls that extend a cache past the trained length must be given the same one.
        A query that sees no key gets zeros from the attention. Raises ValueError for masks that do not fit.
        """
        masks = (is_causal, key_padding_mask, documents, window, attn_mask)
        where = (positions, context_positions, rope_length)
        return self._run(x, context, *masks, *where, cache, with_maps=False)[0]

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
        rope_length: int | Tensor | None = None,
    ) -> Tensor:
        """(B, H, L, S): what each query takes of each value, A1 − λ A2 for DIFF. Arguments as for `forward`."""
        masks = (is_causal, key_padding_mask, documents, window, attn_mask)
        where = (positions, context_positions, rope_length)
        maps = self._run(x, context, *masks, *where, None, with_maps=True)[1]
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
        rope_length: int | Tensor | None,
        cache: KeyValueCache | None,
        with_maps: bool,
    ) -> tuple[Tensor, Tensor | None]:
        source = x if context is None else context
        self._check(x, source, documents, cache, is_causal)
        past = None if cache is None else written(cache.get_seq_length(self.layer_idx))
        if positions is None:
            positions = _counted(x, 0 if past is None or context is not None else past)
        if context is not None and context_positions is None:
            context_positions = _counted(source, 0 if past is None else past)
        _check_positions("positions", positions, x)
        if context_positions is not None:
            _check_positions("context_positions", context_positions, source)
        length = None
        if self.position.depends_on_length:
            if rope_length is not None:
                length = given_length(rope_length, x.shape[0], x.device)
                if key_padding_mask is None:
                    check_given_length(length, longest_request(positions))
            else:
                length = self._longest_request(
                    positions, context_positions, key_padding_mask, documents, past
                )
        heads = self.project(x, source, self.position(positions, context_positions, length, x.dtype), cache)
        mask = MaskSpec(
            is_causal=is_causal,
            offset=past if context is None else None,
            window=window,
            key_padding=key_padding_mask,
            documents=documents,
            dense=attn_mask,
            slopes=self.position.slopes(self.variant.sizes.heads),
        )
        keys = heads.v.shape[2]
        mask.validate(x.shape[0], self.variant.sizes.heads, x.shape[1], keys, x.device)
        mask = mask.within(x.shape[1], keys)
        problem = problem_of(heads, mask, self.variant.mix, with_maps)
        return self.combine(heads, prepare(self.backends, problem, mask, self.automatic), with_maps)

    def _longest_request(
        self,
        positions: Tensor,
        context_positions: Tensor | None,
        real: Tensor | None,
        documents: Tensor | None,
        past: int | Tensor | None,
    ) -> Tensor:
        if past is not None:
            added = positions if context_positions is None else context_positions
            total = None if isinstance(past, Tensor) else past + added.shape[1]
            check_cached_length(self.position.trained_length, past, total)
            # The padding of a cache has no positions here, and all lengths that pass the check are turned alike.
            real = None
        if context_positions is None:
            return longest_request(positions, documents, real)
        if documents is not None:
            raise ValueError(
                "rope_length is missing: with a context, documents do not say how long each of them is"
            )
        return torch.maximum(longest_request(positions), longest_request(context_positions, real=real))

    def _check(
        self,
        x: Tensor,
        source: Tensor,
        documents: Tensor | None,
        cache: KeyValueCache | None,
        is_causal: bool,
    ) -> None:
        if self.position.causal_only and not is_causal:
            raise ValueError(
                f"position {type(self.position).__name__.lower()!r} grows without bound towards later keys: is_causal "
                "must be True"
            )
        for name, value, width in (
            ("x", x, self.q_proj.in_features),
            ("context", source, self.k_proj.in_features),
        ):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor, not {type(value).__name__}")
            if not value.is_floating_point():
                raise ValueError(f"{name} must be floating point, not {value.dtype}")
            if value.ndim != 3 or value.shape[2] != width:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected (batch, tokens, {width})")
            if value.shape[1] == 0:
                raise ValueError(f"{name} has no tokens: its shape is {tuple(value.shape)}")
        if source.device != x.device:
            raise ValueError(f"context is on {source.device}, x on {x.device}; they must agree")
        if cache is not None and not (hasattr(cache, "update") and hasattr(cache, "get_seq_length")):
            raise ValueError(
                f"cache must have Hugging Face's update and get_seq_length, which {type(cache).__name__} has not"
            )
        if source.shape[0] != x.shape[0]:
            raise ValueError(f"context has batch size {source.shape[0]}, x has {x.shape[0]}")
        if documents is not None and cache is not None:
            raise ValueError(
                "documents cannot be combined with a cache: cached keys carry no document numbers"
            )


def head_shape(
    embed_dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None, layer_idx: int
) -> HeadShape:
    check_whole("embed_dim", embed_dim)
    check_whole("num_heads", num_heads)
    if head_dim is None:
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim ({embed_dim}) is not a multiple of num_heads ({num_heads}); give head_dim"
            )
        head_dim = embed_dim // num_heads
    return HeadShape(
        embed_dim, num_heads, num_heads if num_kv_heads is None else num_kv_heads, head_dim, layer_idx
    )


def make_position(
    name: str,
    head_dim: int,
    rope_theta: float | None,
    rope_parameters: Mapping[str, Any] | None,
    max_positions: int | None,
) -> Position:
    """The registered position `name`, with rope_theta put into its parameters."""
    if not isinstance(name, str):
        raise ValueError(f"position must be the name of a registered position, not {name!r}")
    if rope_parameters is not None and not isinstance(rope_parameters, Mapping):
        raise ValueError(f"rope_parameters must be a mapping, not {rope_parameters!r}")
    if max_positions is not None:
        check_whole("max_positions", max_positions)
    parameters = dict(rope_parameters or {})
    if rope_theta is not None and "rope_theta" in parameters:
        raise ValueError("rope_theta is given twice: as an argument and in rope_parameters")
    if rope_theta is not None:
        parameters["rope_theta"] = rope_theta
    method: type[Position] = resolve("positions", name)
    method.check_scaling(parameters)
    return method.from_rope_parameters(head_dim, parameters, max_positions)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")


def _check_positions(name: str, positions: Tensor, x: Tensor) -> None:
    if not isinstance(positions, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, not {type(positions).__name__}")
    if positions.device != x.device:
        raise ValueError(f"{name} is on {positions.device}, x on {x.device}; they must agree")
    expected = (x.shape[0], x.shape[1])
    if positions.ndim != 2 or positions.shape[0] not in (1, expected[0]) or positions.shape[1] != expected[1]:
        raise ValueError(
            f"{name} has shape {tuple(positions.shape)}; expected {expected} or (1, {expected[1]})"
        )
    if positions.dtype == torch.bool or positions.is_floating_point() or positions.is_complex():
        raise ValueError(f"{name} must hold integers, not {positions.dtype}")


def _counted(x: Tensor, start: int | Tensor) -> Tensor:
    return (torch.arange(x.shape[1], device=x.device) + start)[None]
