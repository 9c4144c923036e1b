"""Dynamic NTK scaling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from clearhead.positions.scaling.base import (
    RopeScaling,
    base_change,
    check_base_change,
    number,
    original_length,
    plain_frequencies,
)


@dataclass(frozen=True, kw_only=True)
class DynamicScaling(RopeScaling):
    """The base becomes theta · (s L / L0 − (s − 1))^(D/(D−2)) for a request of L > L0 tokens; up to L0 nothing changes.

    factor: s ≥ 1.    original_max_position_embeddings: L0, by default the model's max_position_embeddings.
    Source: emozilla, "Dynamically Scaled RoPE" (2023); appendix B.1 of YaRN, arXiv 2309.00071, has s = 1.

    Differs from transformers, where L is the longest position ever seen by the module since a call shorter than L0:
    there results depend on earlier inputs and on batch neighbours, and cached keys keep the base of the step that wrote
    them. Here L is the length of the request, for all of its tokens.
    """

    factor: float

    keys = ("factor", "original_max_position_embeddings")
    depends_on_length: ClassVar[bool] = True

    @classmethod
    def from_parameters(
        cls, head_dim: int, theta: float, parameters: Mapping[str, Any], max_positions: int | None
    ) -> Self:
        check_base_change("dynamic", head_dim)
        return cls(
            head_dim=head_dim,
            theta=theta,
            trained_length=original_length("dynamic", parameters, max_positions),
            factor=number("dynamic", parameters, "factor", at_least=1),
        )

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        return plain_frequencies(self.head_dim, self.theta, dtype, device)[None]

    def at(self, tables: Tensor, length: Tensor | None) -> Tensor:
        if length is None:
            return tables[0]
        assert self.trained_length is not None
        beyond = (length - self.trained_length).clamp(min=0).to(tables.dtype)
        growth = 1 + self.factor * beyond / self.trained_length
        return tables[0] * base_change(self.head_dim, growth, tables.dtype, tables.device)
