"""The Transformer's attention: the baseline, and the twin of every variant."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from clearhead.core.norm import HeadNorm, RMSNorm
from clearhead.core.streams import HeadShape, Widths, check_flag, twin_widths
from clearhead.variants.base import SUMMED, Variant


class Softmax(Variant):
    """softmax(q kᵀ / √d) v, grouped-query (Vaswani et al. 2017, Ainslie et al. 2023).

    head_norm: RMSNorm over each head's output, the control of the Differential Transformer's ablation ("+GroupNorm",
        Table 6 of arXiv 2410.05258): it separates what the subtraction does from what the norm does. It adds head_dim
        parameters to each layer.
    """

    tensor_parallel: ClassVar[Mapping[str, str] | None] = {"head_norm": SUMMED}

    def __init__(self, shape: HeadShape, *, head_norm: bool = False, norm_eps: float = 1e-5) -> None:
        super().__init__(shape)
        check_flag("head_norm", head_norm)
        self.head_norm = RMSNorm(shape.head_dim, norm_eps) if head_norm else None

    @classmethod
    def widths(cls, shape: HeadShape) -> Widths:
        return twin_widths(shape)

    def finish(self, o: Tensor) -> Tensor:
        return o if self.head_norm is None else self.head_norm(o)

    def finishing_norm(self) -> HeadNorm | None:
        return HeadNorm.of(self.head_norm)

    def reset_parameters(self) -> None:
        if self.head_norm is not None:
            torch.nn.init.ones_(self.head_norm.weight)
