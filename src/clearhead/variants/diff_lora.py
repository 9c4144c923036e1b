"""DiffLoRA: a second softmax stream of low rank beside a pretrained one."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from clearhead.core.streams import HeadShape, Widths, check_flag, check_whole, split_heads, twin_widths
from clearhead.variants.learned_lambda import LambdaInit, LearnedLambda


class DiffLora(LearnedLambda):
    """DiffLoRA (arXiv 2507.23588): differential attention whose second stream is of low rank, beside the twin's own.

        head = (softmax(q1 k1ᵀ / √d) − λ softmax(q2 k2ᵀ / √d)) v
        q2   = (alpha / rank) · x A B,     k2 likewise;     q1 = x W_Q (+ such a term where both=True), k1 likewise

    Values and output projection are the twin's; the key cache doubles. No head norm (the paper's with one collapses).
    q_proj and k_proj hold W and below it the rows of A (rank of them for the second stream, then rank for the first's
    where both=True); the B are this variant's own.

    lambda_init, lambda_std: λ as in `Differential`. lambda_learned=False fixes it at lambda_init; the paper found 0.1
        more stable so.
    lambda_warmup: optimiser steps over which λ rises from 0, this library's option: without it a model with a DiffLoRA
        in it is not the function it was.

    The paper's settings: rank 64 and alpha 128, or rank 32 and alpha 64 with both=True. Its A and B of the second
    stream both start as Kaiming-uniform, B of the first at 0. Differs from the released code: no dropout in front of
    the adapters.
    """

    def __init__(
        self,
        shape: HeadShape,
        *,
        rank: int = 64,
        alpha: float = 128.0,
        both: bool = False,
        lambda_init: LambdaInit = "depth",
        lambda_learned: bool = True,
        lambda_std: float = 0.1,
        lambda_warmup: int = 0,
    ) -> None:
        check_whole("rank", rank)
        check_flag("both", both)
        check_flag("lambda_learned", lambda_learned)
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, not {alpha}")
        super().__init__(
            shape,
            low_rank_width(shape, rank, both),
            lambda_init=lambda_init,
            lambda_std=lambda_std,
            warmup=lambda_warmup,
            learned=lambda_learned,
        )
        self.rank = rank
        self.both = both
        self.scaling = alpha / rank
        twin = twin_widths(shape)
        self.query_up = nn.Linear(rank, twin.q, bias=False)
        self.key_up = nn.Linear(rank, twin.k, bias=False)
        self.first_query_up = nn.Linear(rank, twin.q, bias=False) if both else None
        self.first_key_up = nn.Linear(rank, twin.k, bias=False) if both else None
        self.reset_parameters()

    @classmethod
    def widths(cls, shape: HeadShape) -> Widths:
        return low_rank_width(shape, 64, False)

    def split_queries(self, q: Tensor) -> tuple[Tensor, ...]:
        return self._streams(q, self.query_up, self.first_query_up, self.sizes.heads)

    def split_keys(self, k: Tensor) -> tuple[Tensor, ...]:
        return self._streams(k, self.key_up, self.first_key_up, self.sizes.kv_heads)

    def _streams(
        self, x: Tensor, up: nn.Linear, up_first: nn.Linear | None, heads: int
    ) -> tuple[Tensor, ...]:
        plain = heads * self.shape.head_dim
        first, low = x[..., :plain], x[..., plain:]
        second = self.scaling * up(low[..., : self.rank])
        if up_first is not None:
            first = first + self.scaling * up_first(low[..., self.rank :])
        return split_heads(first.contiguous(), heads), split_heads(second, heads)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for up in (self.query_up, self.key_up):
            nn.init.kaiming_uniform_(up.weight, a=math.sqrt(5))
        for first in (self.first_query_up, self.first_key_up):
            if first is not None:
                nn.init.zeros_(first.weight)

    def new_rows(self) -> dict[str, Tensor]:
        twin = twin_widths(self.shape)
        return {
            "q_proj": torch.arange(self.sizes.q) >= twin.q,
            "k_proj": torch.arange(self.sizes.k) >= twin.k,
        }


def low_rank_width(shape: HeadShape, rank: int, both: bool) -> Widths:
    """The twin's widths with the rows of A below the queries and keys, and two streams of each."""
    twin = twin_widths(shape)
    more = rank * (2 if both else 1)
    return replace(twin, q=twin.q + more, k=twin.k + more, query_streams=2, key_streams=2)
