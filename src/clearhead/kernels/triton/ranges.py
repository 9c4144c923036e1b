"""Which blocks of keys a block of rows can see at all, from padding and documents; and the same the other way round.

A block is known by the least and the greatest document number in it, padded keys left out: two blocks whose numbers do
not meet are never visited. In packed rows, whose documents follow one another, that is exact.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_LEAST, _MOST = -(2**63), 2**63 - 1


@triton.jit
def meeting(
    own_least, own_most, least, most, out, own_blocks, blocks, stride_own, stride_other, BLOCK: tl.constexpr
):
    """[first, last + 1) of the other side's blocks whose numbers meet this block's; [blocks, 0) where none does."""
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    low = tl.load(own_least + b * stride_own + block)
    high = tl.load(own_most + b * stride_own + block)
    first, last = blocks, 0
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < blocks
        begin = tl.load(least + b * stride_other + at, mask=there, other=0)
        end = tl.load(most + b * stride_other + at, mask=there, other=0)
        meets = there & (begin <= high) & (end >= low) & (begin <= end) & (low <= high)
        first = tl.minimum(first, tl.min(tl.where(meets, at, blocks), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, at + 1, 0), 0))
    tl.store(out + (b * own_blocks + block) * 2, first)
    tl.store(out + (b * own_blocks + block) * 2 + 1, last)


def extremes(numbers: Tensor, real: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """(B, blocks) least and greatest of numbers (B, N); least > greatest where no number of a block is real."""
    low, high = numbers, numbers
    if real is not None:
        low, high = low.masked_fill(~real, _MOST), high.masked_fill(~real, _LEAST)
    missing = -numbers.shape[1] % block
    low, high = (F.pad(x, (0, missing), value=value) for x, value in ((low, _MOST), (high, _LEAST)))
    return low.unflatten(1, (-1, block)).amin(2), high.unflatten(1, (-1, block)).amax(2)


def meet(own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """(B, own blocks, 2) int32 of `meeting`."""
    batch = max(own[0].shape[0], other[0].shape[0])
    own_blocks, blocks = own[0].shape[1], other[0].shape[1]
    out = torch.empty((batch, own_blocks, 2), dtype=torch.int32, device=own[0].device)
    strides = (0 if x.shape[0] == 1 else x.shape[1] for x in (own[0], other[0]))
    meeting[(own_blocks, batch)](*own, *other, out, own_blocks, blocks, *strides, BLOCK=128)
    return out


def document_numbers(
    padding: Tensor | None, documents: Tensor | None, first: Tensor | int, rows: int, repeats: int
) -> tuple[Tensor, Tensor]:
    """The numbers of the keys (B or 1, S) and of the rows (B or 1, rows), all zero without documents."""
    if documents is None:
        assert padding is not None
        zeros = torch.zeros((1, max(rows, padding.shape[1])), dtype=torch.int64, device=padding.device)
        return zeros[:, : padding.shape[1]], zeros[:, :rows]
    tokens = torch.arange(rows // repeats, device=documents.device) + first
    return documents, documents.index_select(1, tokens).repeat_interleave(repeats, 1)
