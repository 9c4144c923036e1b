"""The attention layer of every variant.

Legend: B batch, H query heads, G key-value heads, L queries, S keys, D key width, E value width, K key streams.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from clearhead.core.attend import prepare, problem_of
from clearhead.core.dispatch import automatic_backends, load_backend
from clearhead.core.masks import snapshot_length
from clearhead.core.sparse import BlockSparse
from clearhead.core.streams import HeadShape, check_flag, check_whole
from clearhead.nn.inputs import AttentionInputs
from clearhead.nn.projections import KeyValueCache, ProjectedAttention
from clearhead.positions.base import Position
from clearhead.registry import did_you_mean, resolve
from clearhead.variants.base import make_variant, option_names


class Attention(ProjectedAttention):
    """Self- or cross-attention of any registered variant, by default softmax's, in place of a Transformer's layer.

    variant:      a registered variant, a third party's too: "softmax", "differential", "differential_v2", "collinear",
        "differential_collinear", "differential_v2_collinear", "dex", "diff_lora". Softmax is softmax(q kᵀ / √D) v with
        `num_heads` query heads of width `head_dim` over `num_kv_heads` key-value heads (grouped-query; Vaswani et al.
        2017, Ainslie et al. 2023). `num_heads`, `num_kv_heads` and `head_dim` count as for the Transformer that the
        layer replaces, whatever the variant makes of them.
    options:      the variant's own, for example lambda_init=0.8 for "differential", mode="slack" for "collinear", or
        head_norm=True for "softmax" (RMSNorm on each head's output, a control); see the classes in `variants`.
    embed_dim:    width of x and of the output.        context_dim: width of `context`, by default embed_dim.
    layer_idx:    place in the stack from 0; which layer of a cache is this one's, and λ_init's argument.
    position:     a registered position: "rope", "xpos", "alibi", "nope".
    rope_parameters: RoPE's base, scaling and layout as in `ClearheadConfig`, for example {"rope_type": "dynamic",
        "factor": 4.0}; rope_theta=θ is short for {"rope_theta": θ}.
    max_positions: the length trained with, which scalings count from unless `rope_parameters` say it.
    block_sparse: blocks of keys may be left out, as for `functional.attention`, in every call that is long enough; on
        CPUs only and without gradients.
    backend:      "auto", or the name of an engine or kernel, which is then used or raises with its reason.
    Raises ValueError for sizes that do not fit, naming the argument, and TypeError for an argument that neither the
    layer nor the variant has.

    The other layers here are this one with another variant for good: `DifferentialAttention(...)` is
    `Attention(..., variant="differential")`, parameters, their names and initial values alike.
    """

    variant_name: ClassVar[str] = "softmax"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        variant: str | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        context_dim: int | None = None,
        bias: bool = False,
        position: str = "rope",
        rope_theta: float | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        max_positions: int | None = None,
        block_sparse: BlockSparse | Mapping[str, Any] | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        shape = head_shape(embed_dim, num_heads, num_kv_heads, head_dim, layer_idx)
        place = make_position(position, shape.head_dim, rope_theta, rope_parameters, max_positions)
        name = self._chosen(variant)
        _check_options(type(self), name, options)
        made = make_variant(name, shape, options)
        check_flag("bias", bias)
        if context_dim is not None:
            check_whole("context_dim", context_dim)
        super().__init__(made, bias=bias, context_dim=context_dim)
        self.position = place
        if made.needs_rotation and not place.rotates:
            raise ValueError(
                f"attention {name!r} is defined by rotary angles: position must be one that rotates (rope, xpos), "
                f"not {type(place).__name__.lower()!r}"
            )
        self.block_sparse = BlockSparse.of(block_sparse)
        self.automatic = backend == "auto"
        self.backends = automatic_backends() if self.automatic else (load_backend(backend),)

    def _chosen(self, variant: str | None) -> str:
        own = type(self).variant_name
        if variant is None:
            return own
        if not isinstance(variant, str):
            raise ValueError(f"variant must be the name of a registered variant, not {variant!r}")
        if own not in (variant, Attention.variant_name):
            raise ValueError(
                f"variant {variant!r} was asked of {type(self).__name__}, which is {own!r}: take Attention"
            )
        return variant

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
        inputs = AttentionInputs(
            x,
            context,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            documents=documents,
            window=window,
            attn_mask=attn_mask,
            positions=positions,
            context_positions=context_positions,
            cache=cache,
            rope_length=rope_length,
        )
        return self._run(inputs, with_maps=False)[0]

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
        inputs = AttentionInputs(
            x,
            context,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            documents=documents,
            window=window,
            attn_mask=attn_mask,
            positions=positions,
            context_positions=context_positions,
            rope_length=rope_length,
        )
        maps = self._run(inputs, with_maps=True)[1]
        assert maps is not None
        return maps

    def _run(self, inputs: AttentionInputs, with_maps: bool) -> tuple[Tensor, Tensor | None]:
        if self.position.causal_only and not inputs.is_causal:
            raise ValueError(
                f"position {type(self.position).__name__.lower()!r} grows without bound towards later keys: is_causal "
                "must be True"
            )
        inputs.check(self.q_proj.in_features, self.k_proj.in_features)
        x, source, cache = inputs.x, inputs.source, inputs.cache
        past = None if cache is None else snapshot_length(cache.get_seq_length(self.layer_idx))
        inputs = inputs.placed(past)
        length = inputs.length(self.position, past)
        rotation = self.position(inputs.positions, inputs.context_positions, length, x.dtype)
        # Only a backend that was named is known before there is a problem.
        opened = not self.automatic and self.backends[0].takes_logits
        heads = self.project(x, source, rotation, cache, opened=opened)
        count = self.variant.sizes.heads
        mask = inputs.mask(past, self.position.slopes(count))
        queries, keys = x.shape[1], heads.keys
        mask.validate(x.shape[0], count, queries, keys, x.device)
        mask = replace(mask, sparse=self.block_sparse).within(queries, keys)
        problem = problem_of(heads, mask, self.variant.mixing, with_maps)
        return self.combine(heads, prepare(self.backends, problem, mask, self.automatic), with_maps)


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
    return method.from_parameters(head_dim, parameters, max_positions)


def _check_options(layer: type[Attention], variant: str, options: Mapping[str, Any]) -> None:
    """TypeError, as for any unknown argument of a function, for what neither the layer nor the variant takes."""
    if not options:
        return
    own = option_names(resolve("variants", variant))
    arguments = [
        name for name in inspect.signature(Attention).parameters if name not in ("options", "variant")
    ]
    for name in options:
        if name not in own:
            raise TypeError(
                f"{layer.__name__} with variant {variant!r} has no argument {name!r}: "
                f"{did_you_mean(name, [*arguments, *own])}"
            )
