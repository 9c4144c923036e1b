"""Differential attention, V1."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from clearhead.core.norm import HeadNorm, RMSNorm
from clearhead.core.streams import HeadShape, Widths, check_flag, split_heads, twin_widths
from clearhead.variants.base import SUMMED
from clearhead.variants.learned_lambda import LambdaInit, LearnedLambda, depth_lambda_init

__all__ = ["Differential", "depth_lambda_init", "own_width"]

Values = Literal["paired", "own"]


class Differential(LearnedLambda):
    """Differential attention (Ye et al., arXiv 2410.05258, equations 1-3).

        head_i  = (softmax(q1 k1ᵀ / √d) − λ softmax(q2 k2ᵀ / √d)) v_i,        v_i of width 2d
        λ       = exp(λ_q1 · λ_k1) − exp(λ_q2 · λ_k2) + λ_init,               one scalar a layer
        output  = (1 − λ_init) · RMSNorm(head_i)                              one weight of width 2d for all heads

    A twin with h heads of width d becomes h/2 heads with two streams of width d and one value of width 2d, so the
    projections keep their size and the layer gains 6·d parameters. Stream s of head i is projected by head 2i + s;
    head i reads key-value head i // (H // G) with both its streams (`flash_1` semantics; the released naive file
    pairs keys wrongly under GQA).

    values:      "paired" is the paper's. "own" keeps the twin's heads and values: h heads of value width d, two queries
        and two keys each, so queries, keys and their cache double while v_proj and o_proj are the twin's, and any
        head counts will do (axolotl's diff-transformer plugin and DiffLoRA, arXiv 2507.23588, put the difference into
        a pretrained model so; both leave the norm out).
    lambda_init: "depth" for `depth_lambda_init`, or a constant (0.8 and 0.5 are the paper's ablations).
    head_norm:   False leaves out the norm and its factor, the paper's ablation (it reports instability).
    lambda_warmup: optimiser steps over which λ rises linearly from 0 to what equation 2 says; 0 for none. Whoever
        trains says how far training is (`clearhead.variants.schedule.advance`; recipes do).

    Differs from the released code: rotary pairs (j, j + d/2); λ vectors are computed in float32 and take no weight
        decay.
    """

    # λ is one number for all heads, and the norm's weight is theirs together.
    tensor_parallel: ClassVar[Mapping[str, str] | None] = {"": SUMMED, "head_norm": SUMMED}

    def __init__(
        self,
        shape: HeadShape,
        *,
        values: Values = "paired",
        lambda_init: LambdaInit = "depth",
        head_norm: bool = True,
        norm_eps: float = 1e-5,
        lambda_std: float = 0.1,
        lambda_warmup: int = 0,
    ) -> None:
        if values not in get_args(Values):
            raise ValueError(f"values must be one of {', '.join(get_args(Values))}, not {values!r}")
        check_flag("head_norm", head_norm)
        self.own = values == "own"
        super().__init__(
            shape,
            own_width(shape) if self.own else None,
            lambda_init=lambda_init,
            lambda_std=lambda_std,
            warmup=lambda_warmup,
        )
        self.head_norm = RMSNorm(self.sizes.value_width, norm_eps) if head_norm else None
        self.reset_parameters()

    @classmethod
    def widths(cls, shape: HeadShape) -> Widths:
        for name, count in (("num_heads", shape.num_heads), ("num_kv_heads", shape.num_kv_heads)):
            if count % 2:
                raise ValueError(
                    f"differential attention pairs the twin's heads, so {name} must be even, not {count} "
                    "(its own multi-query form is num_kv_heads = 2)"
                )
        heads, groups, width = shape.num_heads // 2, shape.num_kv_heads // 2, shape.head_dim
        return Widths(
            q=2 * heads * width,
            k=2 * groups * width,
            v=2 * groups * width,
            o=2 * heads * width,
            heads=heads,
            kv_heads=groups,
            query_streams=2,
            key_streams=2,
            key_width=width,
            value_width=2 * width,
        )

    def split_queries(self, q: Tensor) -> tuple[Tensor, ...]:
        return _pairs(q, self.sizes.heads)

    def split_keys(self, k: Tensor) -> tuple[Tensor, ...]:
        return _pairs(k, self.sizes.kv_heads)

    def finish(self, o: Tensor) -> Tensor:
        # The constant λ_init, not the learned λ: it matches the gradient scale of a Transformer layer (appendix G).
        return o if self.head_norm is None else self.head_norm(o) * (1.0 - self.lambda_init)

    def finishing_norm(self) -> HeadNorm | None:
        return HeadNorm.of(self.head_norm, 1.0 - self.lambda_init)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.head_norm is not None:
            nn.init.ones_(self.head_norm.weight)

    def new_rows(self) -> dict[str, Tensor]:
        if not self.own:
            return {}
        width = self.shape.head_dim
        return {
            "q_proj": every_second(self.sizes.q, width),
            "k_proj": every_second(self.sizes.k, width),
        }


def own_width(shape: HeadShape) -> Widths:
    """The twin's heads and values with two queries and two keys a head."""
    twin = twin_widths(shape)
    return replace(twin, q=2 * twin.q, k=2 * twin.k, query_streams=2, key_streams=2)


def every_second(rows: int, width: int) -> Tensor:
    """(rows,) bool: rows of the heads 1, 3, 5, ..., the second streams' where streams lie side by side."""
    return torch.arange(rows) // width % 2 == 1


def _pairs(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, N, heads·2·d) -> two (B, heads, N, d): adjacent projection heads 2i and 2i + 1 are the streams of head i."""
    return split_heads(x, heads).chunk(2, dim=-1)
