"""YaRN."""

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
class YarnScaling(RopeScaling):
    """θ'_j = ramp_j θ_j / s + (1 − ramp_j) θ_j, and cos, sin times `attention_factor` (Peng et al., arXiv 2309.00071).

    ramp_j goes from 0 at j = D(beta_fast) to 1 at j = D(beta_slow), where D(r) = D · ln(L0 / (2π r)) / (2 ln theta) is
    the pair that turns r times in L0 tokens: fast pairs are kept, slow ones interpolated. The same at every length.

    factor:            s ≥ 1, by default max_position_embeddings / L0.
    original_max_position_embeddings: L0, by default the model's max_position_embeddings.
    beta_fast, beta_slow: turns, 32 and 1.        truncate: round D(beta_fast) down and D(beta_slow) up, as released.
    attention_factor:  by default g(1), or g(mscale) / g(mscale_all_dim) if both are given (DeepSeek), where
        g(x) = 0.1 x ln s + 1: section 3.4 scales logits by g(1)².

    As released, the ramp is linear in j; equation 18 has it linear in the number of turns.
    """

    factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0

    keys = (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    )

    @classmethod
    def from_parameters(
        cls, head_dim: int, theta: float, parameters: Mapping[str, Any], max_positions: int | None
    ) -> Self:
        length = original_length("yarn", parameters, max_positions)
        stretch = None if max_positions is None else max_positions / length
        factor = number("yarn", parameters, "factor", stretch, at_least=1)
        fast = number("yarn", parameters, "beta_fast", 32.0, above=0)
        slow = number("yarn", parameters, "beta_slow", 1.0, above=0)
        if fast < slow:
            raise ValueError(
                f"rope_parameters key 'beta_fast' ({fast:g}) must not be less than 'beta_slow' ({slow:g})"
            )
        truncate = parameters.get("truncate", True)
        if not isinstance(truncate, bool):
            raise ValueError(f"rope_parameters key 'truncate' must be true or false, not {truncate!r}")
        if theta <= 1:
            raise ValueError(f"rope_type 'yarn' needs a rope_theta greater than 1, not {theta:g}")
        return cls(
            head_dim=head_dim,
            theta=theta,
            trained_length=length,
            factor=factor,
            beta_fast=fast,
            beta_slow=slow,
            truncate=truncate,
            magnitude=_magnitude(parameters, factor),
        )

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        low, high = self._pair_turning(self.beta_fast), self._pair_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001  # A step: a ramp of no width divides by zero.
        pairs = torch.arange(self.head_dim // 2, dtype=dtype, device=device)
        ramp = ((pairs - low) / (high - low)).clamp(0, 1)
        plain = plain_frequencies(self.head_dim, self.theta, dtype, device)
        return (plain / self.factor * ramp + plain * (1 - ramp))[None]

    def attention_factor(self, length: Tensor | None = None) -> float:
        return self.magnitude

    def _pair_turning(self, times: float) -> float:
        """The (fractional) pair that turns so many times in the trained length."""
        assert self.trained_length is not None
        return (
            self.head_dim * math.log(self.trained_length / (times * 2 * math.pi)) / (2 * math.log(self.theta))
        )


def _magnitude(parameters: Mapping[str, Any], factor: float) -> float:
    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    mscale = number("yarn", parameters, "mscale", 0.0, at_least=0)
    all_dim = number("yarn", parameters, "mscale_all_dim", 0.0, at_least=0)
    derived = grown(mscale) / grown(all_dim) if mscale and all_dim else grown(1.0)
    return number("yarn", parameters, "attention_factor", derived, above=0)
