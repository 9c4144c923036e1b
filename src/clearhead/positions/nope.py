"""No position information beyond the causal mask."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from clearhead.positions.base import NoRotation, Position, Rotation


class Nope(Position):
    """NoPE (Haviv et al. 2022, Kazemnejad et al. 2023): queries and keys are not touched.

    `rope_parameters` are not looked at: in a mix of layers they are the other layers'.
    """

    rotates = False

    @classmethod
    def from_parameters(cls, head_dim: int, parameters: Mapping[str, Any], max_positions: int | None) -> Self:
        return cls()

    def rotation(
        self, positions: Tensor, key_positions: Tensor | None = None, length: Tensor | None = None
    ) -> Rotation:
        return NoRotation()
