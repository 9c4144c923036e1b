"""Differential attention, V1."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clearhead.core.norm import RMSNorm
from clearhead.core.streams import HeadShape, Widths, check_flag, split_heads
from clearhead.variants.base import SUMMED, Variant


def depth_lambda_init(layer_idx: int) -> float:
    """λ_init = 0.8 − 0.6 · exp(−0.3 · layer), the layer counted from 0 (the paper's l − 1): 0.2, 0.3555, 0.4707, ..."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_idx)


class Differential(Variant):
    """Differential attention (Ye et al., arXiv 2410.05258, equations 1-3).

        head_i  = (softmax(q1 k1ᵀ / √d) − λ softmax(q2 k2ᵀ / √d)) v_i,        v_i of width 2d
        λ       = exp(λ_q1 · λ_k1) − exp(λ_q2 · λ_k2) + λ_init,               one scalar a layer
        output  = (1 − λ_init) · RMSNorm(head_i)                              one weight of width 2d for all heads

    A twin with h heads of width d becomes h/2 heads with two streams of width d and one value of width 2d, so the
    projections keep their size and the layer gains 6·d parameters. Stream s of head i is projected by head 2i + s;
    head i reads key-value head i // (H // G) with both its streams (`flash_1` semantics; the released naive file
    pairs keys wrongly under GQA).

    lambda_init: "depth" for `depth_lambda_init`, or a constant (0.8 and 0.5 are the paper's ablations).
    head_norm:   False leaves out the norm and its factor, the paper's ablation (it reports instability).

    Differs from the released code: rotary pairs (j, j + d/2); λ vectors are computed in float32 and take no weight
        decay.
    """

    mixing = "difference"
    float32_parameters = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    # λ is one number for all heads, and the norm's weight is theirs together.
    tensor_parallel: ClassVar[Mapping[str, str] | None] = {"": SUMMED, "head_norm": SUMMED}

    def __init__(
        self,
        shape: HeadShape,
        *,
        lambda_init: Literal["depth"] | float = "depth",
        head_norm: bool = True,
        norm_eps: float = 1e-5,
        lambda_std: float = 0.1,
    ) -> None:
        super().__init__(shape)
        check_flag("head_norm", head_norm)
        known = (
            lambda_init == "depth" if isinstance(lambda_init, str) else isinstance(lambda_init, int | float)
        )
        if not known or isinstance(lambda_init, bool):
            raise ValueError(f'lambda_init must be "depth" or a number, not {lambda_init!r}')
        if not isinstance(lambda_init, str) and not 0.0 <= lambda_init < 1.0:
            raise ValueError(f"lambda_init must be at least 0 and below 1, not {lambda_init}")
        self.lambda_init = (
            depth_lambda_init(shape.layer_idx) if isinstance(lambda_init, str) else float(lambda_init)
        )
        self.lambda_std = lambda_std
        self.lambda_q1 = nn.Parameter(torch.empty(shape.head_dim))
        self.lambda_k1 = nn.Parameter(torch.empty(shape.head_dim))
        self.lambda_q2 = nn.Parameter(torch.empty(shape.head_dim))
        self.lambda_k2 = nn.Parameter(torch.empty(shape.head_dim))
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

    def lambda_full(self) -> Tensor:
        """λ of equation 2, a scalar in float32 (float64 for float64 parameters)."""
        q1, k1, q2, k2 = (
            p if p.dtype == torch.float64 else p.float()
            for p in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        )
        learned = (q1 * k1).sum().exp() - (q2 * k2).sum().exp()
        # As a vector of one: PyTorch makes the forward-mode derivative of a scalar and a number float64.
        return (learned.view(1) + self.lambda_init).view(())

    def gate(self, x: Tensor | None) -> Tensor:
        return self.lambda_full().view(1, 1, 1, 1)

    def finish(self, o: Tensor) -> Tensor:
        # The constant λ_init, not the learned λ: it matches the gradient scale of a Transformer layer (appendix G).
        return o if self.head_norm is None else self.head_norm(o) * (1.0 - self.lambda_init)

    def reset_parameters(self) -> None:
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=self.lambda_std)
        if self.head_norm is not None:
            nn.init.ones_(self.head_norm.weight)

    def mean_lambda(self) -> float:
        return float(self(None).detach())


def _pairs(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, N, heads·2·d) -> two (B, heads, N, d): adjacent projection heads 2i and 2i + 1 are the streams of head i."""
    return split_heads(x, heads).chunk(2, dim=-1)
