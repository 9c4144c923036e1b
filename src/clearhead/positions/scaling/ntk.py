"""NTK-aware scaling with a fixed factor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from clearhead.positions.scaling.base import (
    RopeScaling,
    base_change,
    check_base_change,
    number,
    plain_frequencies,
)


@dataclass(frozen=True, kw_only=True)
class NtkScaling(RopeScaling):
    """θ'_j = θ_j · s^(−2j/(D−2)): the base becomes theta · s^(D/(D−2)), the fastest pair keeps its angle and that of
    the slowest is divided by s exactly.

    factor: s ≥ 1, applied at every length. Source: bloc97, "NTK-Aware Scaled RoPE" (2023); equation 16 of YaRN, arXiv
    2309.00071. transformers has no name for it (pull request 24653 left it out): it is "default" with the new base.
    """

    factor: float

    keys = ("factor",)

    @classmethod
    def from_parameters(
        cls, head_dim: int, theta: float, parameters: Mapping[str, Any], max_positions: int | None
    ) -> Self:
        check_base_change("ntk", head_dim)
        return cls(head_dim=head_dim, theta=theta, factor=number("ntk", parameters, "factor", at_least=1))

    @property
    def scaled_theta(self) -> float:
        """The base of a plain RoPE with the same frequencies."""
        return self.theta * float(self.factor ** (self.head_dim / (self.head_dim - 2)))

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        plain = plain_frequencies(self.head_dim, self.theta, dtype, device)
        return (plain * base_change(self.head_dim, self.factor, dtype, device))[None]
