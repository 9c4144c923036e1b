"""Llama 3.1's scaling."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from clearhead.positions.scaling.base import (
    RopeScaling,
    number,
    original_length,
    plain_frequencies,
)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Pairs that turn at least `high_freq_factor` times in L0 tokens keep θ_j, those that turn at most
    `low_freq_factor` times get θ_j / s, and between the two weights are linear in the number of turns.

        θ'_j = (1 − w) θ_j / s + w θ_j,    w = clamp((L0 θ_j / 2π − low) / (high − low), 0, 1)

    factor: s ≥ 1.    original_max_position_embeddings: L0.    The same at every length. Source: Meta's released model
    code for Llama 3.1 (s = 8, low = 1, high = 4, L0 = 8192); there is no paper with the formula.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float

    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

    @classmethod
    def from_parameters(
        cls, head_dim: int, theta: float, parameters: Mapping[str, Any], max_positions: int | None
    ) -> Self:
        low = number("llama3", parameters, "low_freq_factor", above=0)
        high = number("llama3", parameters, "high_freq_factor", above=0)
        if high <= low:
            raise ValueError(
                f"rope_parameters key 'high_freq_factor' ({high:g}) must be greater than 'low_freq_factor' ({low:g})"
            )
        return cls(
            head_dim=head_dim,
            theta=theta,
            trained_length=original_length("llama3", parameters, max_positions),
            factor=number("llama3", parameters, "factor", at_least=1),
            low_freq_factor=low,
            high_freq_factor=high,
        )

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        assert self.trained_length is not None
        plain = plain_frequencies(self.head_dim, self.theta, dtype, device)
        turns = self.trained_length * plain / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return ((1 - kept) * plain / self.factor + kept * plain)[None]
