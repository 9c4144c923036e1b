"""Keys and values as codes of 8 or 4 bits, and back.

    x ≈ scale · (code + zero),   code = clamp(round(x / scale) − zero, 0, 2^bits − 1),   zero = round(least / scale)

scale (bfloat16) and zero (int16) are shared by the KEY_BLOCK tokens of a block in one channel of a key, which keeps a
channel of large numbers from coarsening the others, and by the VALUE_GROUP channels of one token's value (KIVI, Liu et
al. 2024, arXiv 2402.02750, whose zero point is a floating-point number). scale is rounded up, so that every number is
within half of it: (most − least) / (2^bits − 1), or 1/32000 of the largest magnitude where numbers lie that close.

Legend: B batch, G key-value heads, N tokens, W width of a key or value, S keys.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# As in kernels/cpu/src/problem.h.
KEY_BLOCK = 128
VALUE_GROUP = 64
BITS = (3, 4, 8)  # 3 to measure them: they are held in 4
_FARTHEST = 32_000  # largest |zero|
_LEAST_SCALE = 2.0**-120


@dataclass(frozen=True, slots=True)
class Codes:
    """Numbers (B, G, N, W) as codes, N whole blocks of KEY_BLOCK tokens.

    codes: uint8 (B, G, N / KEY_BLOCK, quads, lanes, 4). Of keys the lanes are tokens and byte i of quad u is channel
        4u + i, of values the lanes are channels and it is token 4u + i of the block: products with them add up along
        the quads, so the CPU kernel adds nothing across a vector. With 4 bits there are half as many quads, and the
        byte's upper half is channel or token 4 · quads + 4u + i.
    scale, zero: bfloat16 and int16, of keys (B, G, N / KEY_BLOCK, W), of values (B, G, ⌈W / VALUE_GROUP⌉, N).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    width: int
    of_keys: bool

    @property
    def tokens(self) -> int:
        return self.codes.shape[2] * KEY_BLOCK

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Codes":
        """With `function` of each tensor, which must leave all but the batch as it is."""
        codes, scale, zero = function(self.codes), function(self.scale), function(self.zero)
        return Codes(codes, scale, zero, self.bits, self.width, self.of_keys)

    def part(self, first: int, count: int) -> "Codes":
        """The tokens from `first` on; both numbers must be of whole blocks."""
        blocks = slice(first // KEY_BLOCK, (first + count) // KEY_BLOCK)
        if self.of_keys:
            scale, zero = self.scale[:, :, blocks], self.zero[:, :, blocks]
        else:
            tokens = slice(first, first + count)
            scale, zero = self.scale[..., tokens], self.zero[..., tokens]
        return Codes(self.codes[:, :, blocks], scale, zero, self.bits, self.width, self.of_keys)

    def followed_by(self, other: "Codes") -> "Codes":
        """These tokens, then those of `other`."""
        along = 2 if self.of_keys else 3
        return Codes(
            torch.cat((self.codes, other.codes), 2),
            torch.cat((self.scale, other.scale), along),
            torch.cat((self.zero, other.zero), along),
            self.bits,
            self.width,
            self.of_keys,
        )

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """(B, G, N, W): what the codes stand for."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), dim=3)
        # (B, G, blocks, quads, lanes, 4) -> (B, G, blocks, channels or tokens, lanes)
        rows = codes.transpose(4, 5).flatten(3, 4)
        tokens = (rows[:, :, :, : self.width].mT if self.of_keys else rows).flatten(2, 3)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale, zero = self.scale, self.zero
        if self.of_keys:
            scale, zero = (x.repeat_interleave(KEY_BLOCK, 2) for x in (scale, zero))
        else:
            scale, zero = (x.mT.repeat_interleave(VALUE_GROUP, 3)[..., : self.width] for x in (scale, zero))
        return ((tokens.to(wide) + zero.to(wide)) * scale.to(wide)).to(dtype)


@dataclass(frozen=True, slots=True)
class Held:
    """The first tokens of a cache: the codes of each key stream, and of the values. `tokens` is one for all."""

    keys: tuple[Codes, ...]
    values: Codes

    @property
    def tokens(self) -> int:
        return self.values.tokens

    @property
    def bits(self) -> int:
        return self.values.bits

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.keys, self.values))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Held":
        return Held(tuple(x.mapped(function) for x in self.keys), self.values.mapped(function))

    def part(self, first: int, count: int) -> "Held":
        """The tokens from `first` on, whole blocks."""
        return Held(tuple(x.part(first, count) for x in self.keys), self.values.part(first, count))

    def followed_by(self, other: "Held") -> "Held":
        keys = zip(self.keys, other.keys, strict=True)
        return Held(tuple(a.followed_by(b) for a, b in keys), self.values.followed_by(other.values))

    def expanded(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
        """The keys of each stream and the values, as numbers."""
        return tuple(x.expanded(dtype) for x in self.keys), self.values.expanded(dtype)

    def pieces(self, tokens: int) -> "Iterator[tuple[int, Held]]":
        """Pieces of at most `tokens` tokens, whole blocks, each with its first token."""
        step = max(KEY_BLOCK, tokens // KEY_BLOCK * KEY_BLOCK)
        for first in range(0, self.tokens, step):
            yield first, self.part(first, min(step, self.tokens - first))


def hold(keys: tuple[Tensor, ...], values: Tensor, bits: int) -> Held:
    """Codes of keys, one (B, G, N, W) a stream, and of values (B, G, N, E); ValueError unless N is whole blocks."""
    if values.shape[2] % KEY_BLOCK:
        raise ValueError(
            f"codes are made of blocks of {KEY_BLOCK} tokens, and {values.shape[2]} tokens are not whole ones"
        )
    return Held(tuple(quantise_keys(k, bits) for k in keys), quantise_values(values, bits))


def quantise_keys(x: Tensor, bits: int) -> Codes:
    """(B, G, N, W) in blocks of KEY_BLOCK tokens, each channel of a block with its own scale."""
    blocks = _wide(x).unflatten(2, (-1, KEY_BLOCK))
    scale, zero = _affine(blocks.amin(3), blocks.amax(3), bits)
    codes = _codes(blocks, scale[:, :, :, None], zero[:, :, :, None], bits)
    return Codes(_packed(codes.mT, bits), scale, zero, max(4, bits), x.shape[3], True)


def quantise_values(x: Tensor, bits: int) -> Codes:
    """(B, G, N, W) token by token, each group of VALUE_GROUP channels with its own scale."""
    found = [_affine(part.amin(3), part.amax(3), bits) for part in _wide(x).split(VALUE_GROUP, 3)]
    scale, zero = (torch.stack(parts, 2) for parts in zip(*found, strict=True))
    channels = torch.arange(x.shape[3], device=x.device) // VALUE_GROUP
    codes = _codes(_wide(x), scale[:, :, channels].mT, zero[:, :, channels].mT, bits)
    return Codes(
        _packed(codes.unflatten(2, (-1, KEY_BLOCK)), bits), scale, zero, max(4, bits), x.shape[3], False
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _affine(least: Tensor, most: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """scale and zero for numbers between `least` and `most`."""
    levels = 2**bits - 1
    size = torch.maximum(least.abs(), most.abs()) / _FARTHEST
    wanted = torch.maximum(most / levels - least / levels, size).clamp(min=_LEAST_SCALE)
    near = wanted.to(torch.bfloat16)
    # The next bfloat16 number above a positive one has the next pattern of bits.
    scale = torch.where(
        near.to(wanted.dtype) < wanted, (near.view(torch.int16) + 1).view(torch.bfloat16), near
    )
    return scale, (least / scale.to(least.dtype)).round().to(torch.int16)


def _codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((x / scale.to(x.dtype)).round_() - zero.to(x.dtype)).clamp_(0, 2**bits - 1).to(torch.uint8)


def _packed(rows: Tensor, bits: int) -> Tensor:
    """(B, G, blocks, channels or tokens, lanes) -> (B, G, blocks, quads, lanes, 4), with codes of 0 where there are
    none."""
    together = 8 if bits <= 4 else 4
    missing = -rows.shape[3] % together
    rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    if bits <= 4:
        lower, upper = rows.chunk(2, dim=3)
        rows = lower | upper << 4
    return rows.unflatten(3, (-1, 4)).transpose(4, 5).contiguous()
