"""Rotary position embedding (Su et al. 2021), in complex numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turning:
    """What a rope scaling asks for in place of a base: θ_j in radians a token, and what multiplies cos and sin."""

    theta: list[float]
    factor: float = 1.0


def angles(width: int, positions: Tensor, base: float | Turning = 10_000.0) -> Tensor:
    """(..., D/2): position · θ_j with θ_j = base^(−2j/D), or those given."""
    if isinstance(base, Turning):
        theta = torch.tensor(base.theta, dtype=torch.float64)
    else:
        theta = torch.tensor([base ** (-2 * j / width) for j in range(width // 2)], dtype=torch.float64)
    return positions.to(torch.float64)[..., None] * theta


def to_complex(x: Tensor) -> Tensor:
    """Pair j of a head is components j and j + D/2."""
    half = x.shape[-1] // 2
    return torch.complex(x[..., :half], x[..., half:])


def to_real(z: Tensor) -> Tensor:
    return torch.cat((z.real, z.imag), dim=-1)


def rotate(x: Tensor, positions: Tensor, base: float | Turning = 10_000.0) -> Tensor:
    """Multiply pair j of x (B, H, L, D) by e^{i · position · θ_j}; positions are (L,) or (B, L)."""
    angle = angles(x.shape[-1], positions, base)
    if angle.dim() == 3:
        angle = angle[:, None]
    length = base.factor if isinstance(base, Turning) else 1.0
    return to_real(to_complex(x) * torch.polar(torch.full_like(angle, length), angle))
