"""Keys and values as codes, number by number in Python's own floats: what `core.quantised` must give.

A group of numbers x shares a scale s and a zero z: code = clamp(round(x / s) − z, 0, 2^bits − 1), x ≈ s · (code + z).
Keys have groups of one channel and a block of tokens, values of one token and some channels (KIVI, arXiv 2402.02750,
section 3). s is a bfloat16 number, the least that is not below (most − least) / (2^bits − 1), the largest magnitude
/ 32000 and 2^−120; z is least / s, rounded. Rounding is to the nearest integer, to the even one of two.

Legend: B batch, G key-value heads, N tokens, W width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def scale_and_zero(numbers: Sequence[float], bits: int) -> tuple[float, int]:
    """s and z of one group."""
    levels = 2**bits - 1
    least, most = min(numbers), max(numbers)
    wanted = max(most / levels - least / levels, max(abs(least), abs(most)) / 32_000, 2.0**-120)
    fraction, exponent = math.frexp(wanted)
    scale = math.ldexp(math.ceil(math.ldexp(fraction, 8)), exponent - 8)  # bfloat16 keeps 8 bits
    return scale, round(least / scale)


def through_codes(numbers: Sequence[float], bits: int) -> list[float]:
    """What one group's codes stand for."""
    scale, zero = scale_and_zero(numbers, bits)
    codes = [min(max(round(x / scale) - zero, 0), 2**bits - 1) for x in numbers]
    return [scale * (code + zero) for code in codes]


def keys(x: Tensor, bits: int, block: int = 128) -> Tensor:
    """(B, G, N, W) in float64, each channel of each block of `block` tokens by itself."""
    out = torch.empty_like(x, dtype=torch.float64)
    for b in range(x.shape[0]):
        for g in range(x.shape[1]):
            for first in range(0, x.shape[2], block):
                for c in range(x.shape[3]):
                    group = x[b, g, first : first + block, c].double().tolist()
                    out[b, g, first : first + block, c] = torch.tensor(
                        through_codes(group, bits), dtype=torch.float64
                    )
    return out


def values(x: Tensor, bits: int, group: int = 64) -> Tensor:
    """(B, G, N, W) in float64, each group of `group` channels of each token by itself."""
    out = torch.empty_like(x, dtype=torch.float64)
    for b in range(x.shape[0]):
        for g in range(x.shape[1]):
            for n in range(x.shape[2]):
                for first in range(0, x.shape[3], group):
                    numbers = x[b, g, n, first : first + group].double().tolist()
                    out[b, g, n, first : first + group] = torch.tensor(
                        through_codes(numbers, bits), dtype=torch.float64
                    )
    return out
