"""Rotary position embedding as it was published."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from clearhead.positions.scaling.base import RopeScaling, plain_frequencies


@dataclass(frozen=True, kw_only=True)
class DefaultScaling(RopeScaling):
    """θ_j = theta^(−2j/D), at every length (Su et al. 2021, section 3.2.2).

    original_max_position_embeddings may be there and says nothing, as in transformers.
    """

    keys = ("original_max_position_embeddings",)

    @classmethod
    def from_parameters(
        cls, head_dim: int, theta: float, parameters: Mapping[str, Any], max_positions: int | None
    ) -> Self:
        return cls(head_dim=head_dim, theta=theta)

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        return plain_frequencies(self.head_dim, self.theta, dtype, device)[None]
