"""How collinear attention places queries and keys: one recipe for every variant whose streams are collinear.

Legend: B batch, N tokens, H query heads of one stream, G key-value heads, D key width.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.positions.base import PlaneRotation, Rotation

Mode = Literal["exact", "slack", "strict"]
Activation = Literal["relu", "softplus"]
_ACTIVATIONS = {"relu": torch.relu, "softplus": F.softplus}


@dataclass(frozen=True)
class CollinearPlacement:
    """The queries q' and keys k' whose plain dot product is the collinear logit (arXiv 2309.08646).

    Per rotary pair j, with q_j the query's pair at position m, t_j ≥ 0 the key's one number at position n and R the
    rotation:

        exact    q' = R_m(|q_j|², 0)                 k' = R_n(t_j, 0)
        strict   exact, q averaged over each pair
        slack    q' = q ∘ R_m q                      k' = R_n(t_j, t_j)

    t = activation of the mean of each pair of the key projection. |q|², t and their rotation are computed in float32
    (float64 for float64 inputs) whatever the input's dtype: the logits are cubic in the layer's input.

    ValueError for an unknown mode or activation, and for an odd head_dim, which has no pairs.
    """

    head_dim: int
    mode: Mode = "exact"
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {self.mode!r}")
        if self.activation not in get_args(Activation):
            raise ValueError(
                f"activation must be one of {', '.join(get_args(Activation))}, not {self.activation!r}"
            )
        if self.head_dim % 2:
            raise ValueError(f"collinear attention ties pairs, so head_dim must be even, not {self.head_dim}")

    def query(self, q: Tensor, rotation: Rotation) -> Tensor:
        """(B, H, N, D) -> (B, H, N, D), one query stream at its positions."""
        wide = _wide(q)
        if self.mode == "slack":
            return (wide * rotation.query(wide)).to(q.dtype)
        first, second = rotation.pairs(wide)
        if self.mode == "strict":
            first = second = (first + second) / 2
        squared = first.square() + second.square()
        return rotation.query(rotation.join(squared, torch.zeros_like(squared))).to(q.dtype)

    def key(self, k: Tensor, rotation: Rotation) -> Tensor:
        """(B, G, N, D) -> (B, G, N, D), one key stream at its positions."""
        return rotation.key(self._tied(self.strength(*rotation.pairs(_wide(k))), rotation)).to(k.dtype)

    def held_key(self, k: Tensor, rotation: Rotation) -> Tensor:
        """(B, G, N, D) -> (B, G, N, D/2): t, all that a cache has to hold of a key. `table` gives it its position."""
        return self.strength(*rotation.pairs(_wide(k))).to(k.dtype)

    def table(self, rotation: Rotation, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B or 1, S, D): k' of a key whose t are all 1, at each of the rotation's key positions, as two halves.

        t scales its pair's two components, so k' = (t ∘ first half, t ∘ second half): the `table` of `Heads`.
        """
        # The same in one pass over memory: it is made for every decoded token.
        if isinstance(rotation, PlaneRotation):
            cos, sin = rotation.key_cos[:, 0].to(dtype), rotation.key_sin[:, 0].to(dtype)
            turned = (cos - sin, cos + sin) if self.mode == "slack" else (cos, sin)
            return torch.cat(turned, dim=-1)
        ones = torch.ones(1, 1, 1, self.head_dim // 2, device=device, dtype=dtype)
        return self._halves(rotation.key(self._tied(ones, rotation)), rotation)[:, 0]

    def query_for_table(self, q: Tensor, rotation: Rotation) -> Tensor:
        """`query` with the components of its pairs in two halves, as the keys of a table have them."""
        return self._halves(self.query(q, rotation), rotation)

    def strength(self, first: Tensor, second: Tensor) -> Tensor:
        """t of the first and second components of a key projection's pairs."""
        return _ACTIVATIONS[self.activation]((first + second) / 2)

    def _tied(self, t: Tensor, rotation: Rotation) -> Tensor:
        return rotation.join(t, t if self.mode == "slack" else torch.zeros_like(t))

    @staticmethod
    def _halves(x: Tensor, rotation: Rotation) -> Tensor:
        return torch.cat(rotation.pairs(x), dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
