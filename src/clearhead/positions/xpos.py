"""Rotary position embedding that decays with distance.

Legend: D key width.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from clearhead.positions.base import Layout, PlaneRotation
from clearhead.positions.rope import Rope, read_rope_parameters
from clearhead.positions.scaling.base import RopeScaling, check_keys, number

_GAMMA, _SCALE_BASE = 0.4, 512.0


class Xpos(Rope):
    """xPos (Sun et al., arXiv 2212.10554, equations 8 to 10): RoPE, and pair j of a query at m times ζ_j^(m/512), of a
    key at n times ζ_j^(−n/512), with ζ_j = (2j/D + γ) / (1 + γ) ≤ 1.

        logit = Σ_j ζ_j^((m − n)/512) |q_j| |k_j| cos((m − n) θ_j + Θ_j),    Θ_j the angle from k_j to q_j

    gamma: γ = 0.4.    scale_base: 512 tokens.    Causal only: towards later keys the same factor grows without bound.

    Both factors are powers of absolute positions, computed and applied in float32 (float64 in float64), counted from
    position 0. The reach is what they can hold: `reach` gives the longest position, 35,694 for the values above, in
    float32 and bfloat16; a float16 model's queries and keys leave its range past 3,966. Longer positions raise
    ValueError where they can be looked at without stalling a device (on the CPU outside `torch.compile`), and give NaN
    elsewhere.

    Differs from x-transformers, whose factors are counted from the middle of the sequence: twice the reach, but the
    middle moves as the sequence grows, so that cached keys and new queries disagree. Here cached keys stay valid.
    """

    causal_only = True

    def __init__(
        self,
        head_dim: int,
        scaling: RopeScaling | None = None,
        layout: Layout = "half",
        *,
        gamma: float = _GAMMA,
        scale_base: float = _SCALE_BASE,
    ) -> None:
        super().__init__(head_dim, scaling, layout)
        if not gamma > 0:
            raise ValueError(f"xpos_gamma must be positive, not {gamma}")
        if not scale_base > 0:
            raise ValueError(f"xpos_scale_base must be positive, not {scale_base}")
        self.gamma = gamma
        self.scale_base = scale_base

    @classmethod
    def from_parameters(cls, head_dim: int, parameters: Mapping[str, Any], max_positions: int | None) -> Self:
        known = ("rope_type", "rope_theta", "layout", "xpos_gamma", "xpos_scale_base")
        if parameters.get("rope_type", "default") != "default":
            raise ValueError(
                f'position "xpos" has no scalings: rope_type must be "default", not {parameters["rope_type"]!r}'
            )
        check_keys('position "xpos"', parameters, known)
        rope = {key: value for key, value in parameters.items() if not key.startswith("xpos_")}
        scaling, layout = read_rope_parameters(head_dim, rope, max_positions)
        made = cls(
            head_dim,
            scaling,
            layout,
            gamma=number("xpos", parameters, "xpos_gamma", _GAMMA, above=0),
            scale_base=number("xpos", parameters, "xpos_scale_base", _SCALE_BASE, above=0),
        )
        if max_positions is not None and max_positions - 1 > made.reach(torch.float32):
            raise ValueError(
                f'position "xpos" reaches position {made.reach(torch.float32)} in float32, which is less than '
                f"max_position_embeddings ({max_positions}); raise xpos_scale_base"
            )
        return made

    def reach(self, dtype: torch.dtype) -> int:
        """The last position whose factor, and one over it, are normal numbers of `dtype`."""
        weakest = self.gamma / (1 + self.gamma)
        return int(self.scale_base * math.log(torch.finfo(dtype).tiny) / math.log(weakest))

    def rotation(
        self, positions: Tensor, key_positions: Tensor | None = None, length: Tensor | None = None
    ) -> PlaneRotation:
        keys = positions if key_positions is None else key_positions
        turned = super().rotation(positions, key_positions, length)
        shrunk, grown = (self._factor(p, turned.query_cos.dtype) for p in (positions, -keys))
        return PlaneRotation(
            turned.query_cos * shrunk,
            turned.query_sin * shrunk,
            turned.key_cos * grown,
            turned.key_sin * grown,
            self.layout,
        )

    def _factor(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """(B or 1, 1, N, D/2) ζ_j^(position/512)."""
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_reach(positions, dtype)
        pairs = torch.arange(0, self.head_dim, 2, dtype=dtype, device=positions.device) / self.head_dim
        zeta = (pairs + self.gamma) / (1 + self.gamma)
        return (zeta ** (positions[..., None].to(dtype) / self.scale_base))[:, None]

    def _check_reach(self, positions: Tensor, dtype: torch.dtype) -> None:
        furthest = int(positions.abs().max())
        if furthest > self.reach(dtype):
            raise ValueError(
                f'position {furthest} is past the reach of position "xpos", which is {self.reach(dtype)}; raise '
                "xpos_scale_base"
            )
