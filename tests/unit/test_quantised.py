"""Codes of keys and values against the oracle, and what they cost and lose."""

import pytest
import torch
from tests.oracles import quantised as oracle
from torch import Tensor

from clearhead.core.quantised import KEY_BLOCK, VALUE_GROUP, hold, quantise_keys, quantise_values

KINDS = ("normal", "shifted", "positive", "outlier channel", "constant", "tiny", "huge", "zero")


def numbers(kind: str, width: int = 70, tokens: int = 256) -> Tensor:
    rng = torch.Generator().manual_seed(width)
    x = torch.randn(2, 2, tokens, width, generator=rng, dtype=torch.float64)
    change = {
        "normal": lambda: x,
        "shifted": lambda: x + 300,
        "positive": lambda: x.relu(),
        "outlier channel": lambda: x * torch.where(torch.arange(width) == 3, 200.0, 1.0),
        "constant": lambda: torch.full_like(x, -7.3),
        "tiny": lambda: x * 1e-33,
        "huge": lambda: x * 1e37,
        "zero": lambda: x * 0,
    }
    return change[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_equal_the_oracle(bits: int, kind: str) -> None:
    x = numbers(kind, width=9, tokens=KEY_BLOCK)
    assert torch.equal(quantise_keys(x, bits).expanded(torch.float64), oracle.keys(x, bits))
    x = numbers(kind, width=VALUE_GROUP + 3, tokens=KEY_BLOCK)[:, :1]
    assert torch.equal(quantise_values(x, bits).expanded(torch.float64), oracle.values(x, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_no_number_is_further_off_than_half_its_scale(bits: int, kind: str, dtype: torch.dtype) -> None:
    x = numbers(kind).to(dtype)
    for codes, scale in (
        (found := quantise_keys(x, bits), found.scale.repeat_interleave(KEY_BLOCK, 2)),
        (found := quantise_values(x, bits), found.scale.mT.repeat_interleave(VALUE_GROUP, 3)[..., :70]),
    ):
        error = (codes.expanded(torch.float64) - x.double()).abs()
        # The division is rounded to float32, whose quotients are below 2^15.
        assert (error <= scale.double() * (0.5 + 2.0**-8)).all()


def test_a_channel_of_large_numbers_leaves_the_others_as_fine_as_they_were() -> None:
    plain, large = (
        quantise_keys(numbers(kind), 8).expanded(torch.float64) for kind in ("normal", "outlier channel")
    )
    others = torch.arange(70) != 3
    assert torch.equal(plain[..., others], large[..., others])


@pytest.mark.parametrize("bits", [8, 4])
def test_pieces_and_their_sum_are_the_whole(bits: int) -> None:
    x = numbers("normal", tokens=5 * KEY_BLOCK)
    whole = hold((x, x * 2), x[..., :33], bits)
    assert whole.tokens == 5 * KEY_BLOCK
    keys, values = whole.expanded(torch.float64)
    pieces = list(whole.pieces(300))
    assert [first for first, _ in pieces] == [0, 2 * KEY_BLOCK, 4 * KEY_BLOCK]
    for first, piece in pieces:
        own, theirs = piece.expanded(torch.float64)
        part = slice(first, first + piece.tokens)
        assert torch.equal(theirs, values[:, :, part])
        assert all(torch.equal(a, b[:, :, part]) for a, b in zip(own, keys, strict=True))
    joined = pieces[0][1].followed_by(pieces[1][1]).followed_by(pieces[2][1])
    assert torch.equal(joined.expanded(torch.float64)[1], values)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.53), (4, 0.29)])
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (64, 128), (32, 64), (128, 256)])
def test_codes_with_their_scales_are_as_small_as_promised(
    bits: int, most: float, width: int, value_width: int
) -> None:
    k, v = torch.randn(1, 2, 1024, width), torch.randn(1, 2, 1024, value_width)
    held = hold((k, k), v, bits)
    tensors = [x for part in (*held.keys, held.values) for x in (part.codes, part.scale, part.zero)]
    counted = sum(x.numel() * x.element_size() for x in tensors)
    assert held.nbytes == counted
    assert counted <= most * 2 * (2 * k.numel() + v.numel())


def test_tokens_that_are_no_whole_blocks_are_refused() -> None:
    x = torch.zeros(1, 1, KEY_BLOCK + 1, 8)
    with pytest.raises(ValueError, match="129 tokens are not whole ones"):
        hold((x,), x, 8)
