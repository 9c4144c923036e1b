"""LongRoPE."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from clearhead.positions.scaling.base import (
    RopeScaling,
    number,
    original_length,
    plain_frequencies,
)


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling(RopeScaling):
    """θ'_j = θ_j / long_j for requests longer than L0, θ_j / short_j for others, and cos, sin times
    sqrt(1 + ln s / ln L0) at every length (Ding et al., arXiv 2402.13753; the factors are searched for, not computed).

    short_factor, long_factor: D/2 positive numbers each.
    original_max_position_embeddings: L0, by default the model's max_position_embeddings.
    factor:            s, by default max_position_embeddings / L0.    attention_factor: in place of the square root.

    Differs from transformers, which switches by the longest position of the batch in the call at hand: there a decode
    that crosses L0 reads keys that were turned by the other factors. Here the request's length decides for all of it.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float
    magnitude: float = 1.0

    keys = (
        "short_factor",
        "long_factor",
        "factor",
        "attention_factor",
        "original_max_position_embeddings",
    )
    depends_on_length: ClassVar[bool] = True

    @classmethod
    def from_parameters(
        cls, head_dim: int, theta: float, parameters: Mapping[str, Any], max_positions: int | None
    ) -> Self:
        length = original_length("longrope", parameters, max_positions)
        stretch = 1.0 if max_positions is None else max(max_positions / length, 1.0)
        factor = number("longrope", parameters, "factor", stretch, above=0)
        derived = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
        return cls(
            head_dim=head_dim,
            theta=theta,
            trained_length=length,
            short_factor=_factors(parameters, "short_factor", head_dim // 2),
            long_factor=_factors(parameters, "long_factor", head_dim // 2),
            factor=factor,
            magnitude=number("longrope", parameters, "attention_factor", derived, above=0),
        )

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        plain = plain_frequencies(self.head_dim, self.theta, dtype, device)
        return plain / torch.tensor([self.short_factor, self.long_factor], dtype=dtype, device=device)

    def at(self, tables: Tensor, length: Tensor | None) -> Tensor:
        short, long = tables.unbind()
        if length is None:
            return short
        assert self.trained_length is not None
        return torch.where(length > self.trained_length, long, short)

    def attention_factor(self, length: Tensor | None = None) -> float:
        return self.magnitude


def _factors(parameters: Mapping[str, Any], key: str, pairs: int) -> tuple[float, ...]:
    values = parameters.get(key)
    if (
        not isinstance(values, Sequence)
        or isinstance(values, str)
        or len(values) != pairs
        or not all(isinstance(value, int | float) and value > 0 for value in values)
    ):
        found = f"{len(values)} values" if isinstance(values, Sequence) else repr(values)
        raise ValueError(
            f"rope_parameters key {key!r} must be {pairs} positive numbers, one a pair, not {found}"
        )
    return tuple(float(value) for value in values)
