"""Attention with linear biases."""

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from clearhead.positions.base import NoRotation, Position, Rotation


class Alibi(Position):
    """ALiBi (Press et al., arXiv 2108.12409, section 3): slope_h · (m − n) is taken off head h's scaled logits.

    m is the query's position and n the key's; queries and keys are not rotated. Heads are those of the output: both
    streams of a differential head share its slope, so V1, with half of its twin's heads, has the slopes of that many.
    Where a key may lie behind the query (not causal), |m − n|: the paper is about causal models only.
    `rope_parameters` are not looked at: in a mix of layers they are the other layers'.

    Differs from BLOOM, whose bias is slope · n, the same up to a number a row, in the model's dtype: bfloat16 cannot
    tell positions past 256 apart. Here the distance itself, in float32 whatever the model's dtype (float64 in float64).
    """

    rotates = False

    @classmethod
    def from_parameters(cls, head_dim: int, parameters: Mapping[str, Any], max_positions: int | None) -> Self:
        return cls()

    def rotation(
        self, positions: Tensor, key_positions: Tensor | None = None, length: Tensor | None = None
    ) -> Rotation:
        return NoRotation()

    def slopes(self, heads: int) -> Tensor:
        return slopes(heads)


def slopes(heads: int) -> Tensor:
    """(H,) in float64, for a power of two 2^(−8i/H), i = 1 ... H: the paper's geometric sequence down to 2^−8.

    Otherwise, with p the largest power of two below H: those of p heads, then every second one of 2p heads, from the
    first, H − p of them (the authors' `get_slopes`, which BLOOM, MPT and Falcon follow). ValueError for no heads.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, not {heads}")
    power = 2 ** math.floor(math.log2(heads))
    values = [*_geometric(power), *_geometric(2 * power)[::2]][:heads]
    return torch.tensor(values, dtype=torch.float64)


def _geometric(heads: int) -> list[float]:
    return [2.0 ** (-8 * i / heads) for i in range(1, heads + 1)]
