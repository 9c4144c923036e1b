"""How the rows of projections are ordered, as permutations with their inverses.

A projection's rows are heads of one width; every function takes (rows, ...) and gives the same rows in another order,
bit for bit.
"""

from torch import Tensor


def pairs_to_halves(rows: Tensor, width: int) -> Tensor:
    """Rotary pairs (2j, 2j + 1) of each head to pairs (j, j + width / 2)."""
    return _swap(rows, -1, width // 2, 2)


def halves_to_pairs(rows: Tensor, width: int) -> Tensor:
    """The inverse of `pairs_to_halves`."""
    return _swap(rows, -1, 2, width // 2)


def chunks_to_stripes(rows: Tensor, heads: int) -> Tensor:
    """Heads i and heads / 2 + i, the streams of one differential head, to heads 2i and 2i + 1."""
    return _swap(rows, 1, 2, heads // 2)


def stripes_to_chunks(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `chunks_to_stripes`."""
    return _swap(rows, 1, heads // 2, 2)


def _swap(rows: Tensor, outer: int, first: int, second: int) -> Tensor:
    """Blocks (outer, first, second, rest) of rows in the order (outer, second, first, rest)."""
    shape = (outer, first, second, -1) if outer != -1 else (-1, first, second, 1)
    blocks = rows.reshape(*shape, *rows.shape[1:])
    return blocks.transpose(1, 2).reshape(rows.shape)
