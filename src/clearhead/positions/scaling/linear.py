"""Position interpolation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from clearhead.positions.scaling.base import RopeScaling, number, plain_frequencies


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """θ'_j = θ_j / s: positions are squeezed into the trained range (PI; Chen et al., arXiv 2306.15595, equation 3).

    factor: s ≥ 1. It is meant to be fine-tuned with; without that it blurs near positions.
    """

    factor: float

    # The trained length may be there and says nothing, as in transformers.
    keys = ("factor", "original_max_position_embeddings")

    @classmethod
    def from_parameters(
        cls, head_dim: int, theta: float, parameters: Mapping[str, Any], max_positions: int | None
    ) -> Self:
        return cls(head_dim=head_dim, theta=theta, factor=number("linear", parameters, "factor", at_least=1))

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        return plain_frequencies(self.head_dim, self.theta, dtype, device)[None] / self.factor
