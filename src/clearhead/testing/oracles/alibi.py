"""ALiBi (Press et al., arXiv 2108.12409): linear biases, and the slopes of any number of heads."""

import math

import torch
from torch import Tensor


def slope(head: int, heads: int) -> float:
    """Of head 0 ... heads − 1: 2^(−8 (head + 1) / heads) for a power of two.

    Otherwise the first p heads, p the largest power of two below `heads`, have those of p heads, and head p + i has
    that of head 2i among 2p.
    """
    power = 1
    while 2 * power <= heads:
        power *= 2
    if power == heads:
        return math.pow(2.0, -8.0 * (head + 1) / heads)
    return slope(head, power) if head < power else slope(2 * (head - power), 2 * power)


def bias(slopes: Tensor, queries: int, keys: int, first: int | None = None) -> Tensor:
    """(1, H, L, S): −slope_h times how many tokens lie between query and key, the queries being the last L positions.

    `first` puts the first query at that position instead.
    """
    first = keys - queries if first is None else first
    between = [[float(abs(first + i - j)) for j in range(keys)] for i in range(queries)]
    return torch.stack([-float(slope) * torch.tensor(between, dtype=torch.float64) for slope in slopes])[None]
