"""Attention layers with maps other than softmax's."""

from collections.abc import Mapping
from typing import Any, Literal

from clearhead.nn.attention import Attention, check_flag, head_shape, make_position
from clearhead.variants.collinear import Collinear
from clearhead.variants.differential import Differential
from clearhead.variants.differential_collinear import DifferentialCollinear, DifferentialV2Collinear
from clearhead.variants.differential_v2 import DifferentialV2
from clearhead.variants.placement import Activation, Mode


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
        position: str = "rope",
        rope_theta: float | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        max_positions: int | None = None,
        lambda_init: Literal["depth"] | float = "depth",
        head_norm: bool = True,
        backend: str = "auto",
    ) -> None:
        shape = head_shape(embed_dim, num_heads, num_kv_heads, head_dim, layer_idx)
        place = make_position(position, shape.head_dim, rope_theta, rope_parameters, max_positions)
        check_flag("head_norm", head_norm)
        variant = Differential(shape, lambda_init=lambda_init, head_norm=head_norm)
        self._build(variant, place, bias, context_dim, backend)


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
        position: str = "rope",
        rope_theta: float | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        max_positions: int | None = None,
        backend: str = "auto",
    ) -> None:
        shape = head_shape(embed_dim, num_heads, num_kv_heads, head_dim, layer_idx)
        place = make_position(position, shape.head_dim, rope_theta, rope_parameters, max_positions)
        self._build(DifferentialV2(shape), place, bias, context_dim, backend)


class CollinearAttention(Attention):
    """Collinear constrained attention: softmax(Σ_j t_j |q_j|² cos((m − n) θ_j) / √D) v in mode "exact".

    Same parameters as the Transformer layer it replaces; position must rotate. The three modes, sources and differences
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
        position: str = "rope",
        rope_theta: float | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        max_positions: int | None = None,
        mode: Mode = "exact",
        activation: Activation = "relu",
        backend: str = "auto",
    ) -> None:
        shape = head_shape(embed_dim, num_heads, num_kv_heads, head_dim, layer_idx)
        place = make_position(position, shape.head_dim, rope_theta, rope_parameters, max_positions)
        variant = Collinear(shape, mode=mode, activation=activation)
        self._build(variant, place, bias, context_dim, backend)


class DifferentialCollinearAttention(Attention):
    """Differential attention V1 whose two streams are both collinear, each to its own key.

    Same head counts and parameters as `DifferentialAttention`; position must rotate. Formula and sources:
    `variants.differential_collinear.DifferentialCollinear`; the other arguments: `Attention`.
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
        mode: Mode = "exact",
        activation: Activation = "relu",
        lambda_init: Literal["depth"] | float = "depth",
        head_norm: bool = True,
        backend: str = "auto",
    ) -> None:
        shape = head_shape(embed_dim, num_heads, num_kv_heads, head_dim, layer_idx)
        place = make_position(position, shape.head_dim, rope_theta, rope_parameters, max_positions)
        check_flag("head_norm", head_norm)
        variant = DifferentialCollinear(
            shape, mode=mode, activation=activation, lambda_init=lambda_init, head_norm=head_norm
        )
        self._build(variant, place, bias, context_dim, backend)


class DifferentialCollinearAttentionV2(Attention):
    """Differential attention V2 whose two query streams are collinear to their shared key.

    Same head counts and parameters as `DifferentialAttentionV2`; position must rotate. Formula and sources:
    `variants.differential_collinear.DifferentialV2Collinear`; the other arguments: `Attention`.
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
        mode: Mode = "exact",
        activation: Activation = "relu",
        backend: str = "auto",
    ) -> None:
        shape = head_shape(embed_dim, num_heads, num_kv_heads, head_dim, layer_idx)
        place = make_position(position, shape.head_dim, rope_theta, rope_parameters, max_positions)
        variant = DifferentialV2Collinear(shape, mode=mode, activation=activation)
        self._build(variant, place, bias, context_dim, backend)
