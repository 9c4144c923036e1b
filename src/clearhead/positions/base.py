"""What a position method gives a layer.

Legend: B batch, N tokens, H query heads, G key-value heads, L queries, S keys, D key width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from clearhead.core.values import moved

# Which components of a head are pair j: (j, j + D/2) or (2j, 2j + 1).
Layout = Literal["half", "interleaved"]


class Rotation(ABC):
    """A map of query and key streams at given positions, applied where the variant asks for it."""

    layout: Layout = "half"

    @abstractmethod
    def query(self, x: Tensor) -> Tensor:
        """x (B, H, L, D) at the queries' positions."""

    @abstractmethod
    def key(self, x: Tensor) -> Tensor:
        """x (B, G, S, D) at the keys' positions."""

    def to(self, device: torch.device) -> Self:
        """The same on another device, for layers that are there."""
        there: Self = moved(self, device)
        return there

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second components of the pairs that are turned, (..., D) -> (..., D/2) each."""
        if self.layout == "interleaved":
            return x[..., 0::2], x[..., 1::2]
        first, second = x.chunk(2, dim=-1)
        return first, second

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """The inverse of `pairs`."""
        if self.layout == "interleaved":
            return torch.stack((first, second), dim=-1).flatten(-2)
        return torch.cat((first, second), dim=-1)


class NoRotation(Rotation):
    """Leaves queries and keys as they are."""

    def query(self, x: Tensor) -> Tensor:
        return x

    def key(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, slots=True)
class PlaneRotation(Rotation):
    """Turns pair j by the angle position · θ_j, and may stretch it.

    cos, sin: (B or 1, 1, N, D/2) in float32 (float64 for float64 models), for queries and for keys; both times a common
        factor where the position method stretches. The product is taken in that precision and cast back, whatever the
        dtype of x: bfloat16 cannot tell positions past 256 apart.
    """

    query_cos: Tensor
    query_sin: Tensor
    key_cos: Tensor
    key_sin: Tensor
    layout: Layout = "half"

    def query(self, x: Tensor) -> Tensor:
        return self._turn(x, self.query_cos, self.query_sin)

    def key(self, x: Tensor) -> Tensor:
        return self._turn(x, self.key_cos, self.key_sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = self.pairs(x)
        first, second = first.to(cos.dtype), second.to(cos.dtype)
        return self.join(first * cos - second * sin, first * sin + second * cos).to(x.dtype)


class Position(nn.Module, ABC):
    """A position method: one instance and one rotation a forward pass, shared by all layers that use it.

    It is called, and its `rotation` answers: so buffers that are kept elsewhere until they are needed are brought in.

    rotates:    whether it turns pairs, which collinear variants are defined by.
    causal_only: whether it is defined only where a query sees no later key.
    """

    rotates: ClassVar[bool] = True
    causal_only: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def from_parameters(cls, head_dim: int, parameters: Mapping[str, Any], max_positions: int | None) -> Self:
        """The method for heads of width `head_dim`, from a configuration's `rope_parameters`, or ValueError.

        max_positions: the length that the model was trained with, where `rope_parameters` do not say it.
        """

    @abstractmethod
    def rotation(
        self, positions: Tensor, key_positions: Tensor | None = None, length: Tensor | None = None
    ) -> Rotation:
        """For queries at `positions` (B or 1, L) and keys at `key_positions` (B or 1, S), by default the same.

        length: integers, (B or 1, 1) for each row or, where L = S, (B or 1, L) for each token: the length of the
            request that it belongs to. Only methods with `depends_on_length` look at it; by default the row's longest
            position + 1.
        """

    def forward(
        self,
        positions: Tensor,
        key_positions: Tensor | None = None,
        length: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Rotation:
        """`rotation`, computed in float64 where queries and keys of that dtype are to be turned."""
        if dtype == torch.float64 and any(buffer.dtype == torch.float32 for buffer in self.buffers()):
            self.double()
        return self.rotation(positions, key_positions, length=length)

    @classmethod
    def check_scaling(cls, parameters: Mapping[str, Any]) -> None:
        """Raise ValueError for a rope scaling that a method without angles, alone in its model, would not look at."""
        kind = parameters.get("rope_type", "default")
        if not cls.rotates and kind != "default":
            raise ValueError(
                f"rope_parameters ask for rope_type {kind!r}, but position {cls.__name__.lower()!r} turns nothing that "
                "could be scaled: leave rope_parameters out"
            )

    @property
    def depends_on_length(self) -> bool:
        """Whether the rotation of a token depends on how long its request is."""
        return False

    @property
    def trained_length(self) -> int | None:
        """The length up to which all requests are rotated the same; None where there is no such length."""
        return None

    def slopes(self, heads: int) -> Tensor | None:
        """(H,) in float64 or float32: what a token of distance takes off each head's logits; None for nothing."""
        return None

    def reset_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds anew, after the module was built without memory or moved."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # Every cast, move and `to_empty` comes through here, and may leave what is rounded or no value at all.
        super()._apply(fn, recurse)
        self.reset_buffers()
        return self
