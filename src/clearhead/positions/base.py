"""What a position method gives a layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class Rotation(ABC):
    """A map of query and key streams at given positions, applied where the variant asks for it."""

    @abstractmethod
    def query(self, x: Tensor) -> Tensor:
        """x (B, H, L, D) at the queries' positions."""

    @abstractmethod
    def key(self, x: Tensor) -> Tensor:
        """x (B, G, S, D) at the keys' positions."""


class NoRotation(Rotation):
    """Leaves queries and keys as they are."""

    def query(self, x: Tensor) -> Tensor:
        return x

    def key(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, slots=True)
class PlaneRotation(Rotation):
    """Turns pairs (j, j + D/2) by the angle position · θ_j.

    cos, sin: (B or 1, 1, N, D/2) in float32 (float64 for float64 models), for queries and for keys. The product is
        taken in that precision
    and cast back, whatever the dtype of x: bfloat16 cannot tell positions past 256 apart.
    """

    query_cos: Tensor
    query_sin: Tensor
    key_cos: Tensor
    key_sin: Tensor

    def query(self, x: Tensor) -> Tensor:
        return _turn(x, self.query_cos, self.query_sin)

    def key(self, x: Tensor) -> Tensor:
        return _turn(x, self.key_cos, self.key_sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    first, second = first.to(cos.dtype), second.to(cos.dtype)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class Position(nn.Module, ABC):
    """A position method of a whole model: one instance, one rotation a forward pass, shared by all layers."""

    rotates: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def from_rope_parameters(cls, head_dim: int, parameters: Mapping[str, Any]) -> Self:
        """The method for heads of width `head_dim`, from a configuration's `rope_parameters`, or ValueError."""

    @abstractmethod
    def rotation(self, positions: Tensor, key_positions: Tensor | None = None) -> Rotation:
        """For queries at `positions` (B or 1, L) and keys at `key_positions` (B or 1, S), by default the same."""
