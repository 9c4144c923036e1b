"""Rotary position embedding."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from clearhead.positions.base import PlaneRotation, Position, Rotation
from clearhead.registry import did_you_mean


class Rope(Position):
    """RoPE (Su et al. 2021): pair j of a head of width D turns by position · θ_j, θ_j = theta^(−2j/D), D even.

    Pairs are (j, j + D/2), as in LLaMA and Hugging Face; the released Differential Transformer pairs (2j, 2j + 1),
    which is the same up to a permutation of projection rows. Angles are computed in float32 whatever the model's dtype.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rope turns pairs, so head_dim must be even, not {head_dim}")
        if not theta > 0:
            raise ValueError(f"rope_theta must be positive, not {theta}")
        self.head_dim = head_dim
        self.theta = float(theta)
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    @classmethod
    def from_rope_parameters(cls, head_dim: int, parameters: Mapping[str, Any]) -> Self:
        unknown = sorted(set(parameters) - {"rope_type", "rope_theta"})
        if parameters.get("rope_type", "default") != "default":
            raise ValueError(f'position "rope" knows rope_type "default", not {parameters["rope_type"]!r}')
        if unknown:
            hint = did_you_mean(unknown[0], ("rope_type", "rope_theta"))
            raise ValueError(f'position "rope" has no rope_parameters key {unknown[0]!r}: {hint}')
        return cls(head_dim, float(parameters.get("rope_theta", 10000.0)))

    def frequencies(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(D/2,) θ_j."""
        return 1.0 / (self.theta ** (torch.arange(0, self.head_dim, 2, dtype=dtype) / self.head_dim))

    def rotation(self, positions: Tensor, key_positions: Tensor | None = None) -> Rotation:
        cos, sin = self._angles(positions)
        if key_positions is None:
            return PlaneRotation(cos, sin, cos, sin)
        return PlaneRotation(cos, sin, *self._angles(key_positions))

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        # `model.to(dtype)` casts buffers too: what bfloat16 lost and what float64 never had is computed anew.
        inv_freq = self.inv_freq
        if inv_freq.dtype != torch.float32:
            wide = torch.float64 if inv_freq.dtype == torch.float64 else torch.float32
            inv_freq = self.frequencies(wide).to(positions.device)
        angles = (positions[..., None].to(inv_freq.dtype) * inv_freq)[:, None]
        return angles.cos(), angles.sin()
