"""ALiBi as BLOOM and MPT of transformers compute it: the slopes, and one attention from the same projections."""

import math

import pytest
import torch
from transformers import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomAttention, _get_alibi_slopes, build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from clearhead.functional import attention
from clearhead.positions.alibi import slopes
from tests.oracles import alibi

HEADS = (1, 2, 3, 5, 8, 12, 16, 20, 25, 112)


@pytest.mark.parametrize("heads", HEADS)
def test_slopes_are_bloom_s_and_the_formula_s(heads: int) -> None:
    found = slopes(heads)
    assert (found.dtype, found.shape) == (torch.float64, (heads,))
    exact = torch.tensor([alibi.slope(head, heads) for head in range(heads)], dtype=torch.float64)
    # The formula to float64 rounding; BLOOM multiplies a rounded base up to 16 times and more.
    assert float((found / exact - 1).abs().max()) <= 2 * torch.finfo(torch.float64).eps
    theirs = _get_alibi_slopes(heads, torch.device("cpu")).double()
    assert float((found / theirs - 1).abs().max()) <= heads * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("heads", HEADS)
def test_slopes_are_mpt_s(heads: int) -> None:
    # The bias of the last but one of the keys, one token away from the last.
    theirs = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
    # Where 2^⌈log2 H⌉ is not H, MPT takes every second slope from the second on first: the same list.
    assert float((slopes(heads) / theirs - 1).abs().max()) < 1e-6


def test_the_slopes_of_twelve_heads_as_printed() -> None:
    printed = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    printed += [math.sqrt(0.5), math.sqrt(0.125), math.sqrt(0.03125), math.sqrt(0.0078125)]
    assert slopes(12).tolist() == pytest.approx(printed, rel=1e-7)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [8, 12])
@torch.no_grad()
def test_attention_is_bloom_s(heads: int, padded: bool, backend: str) -> None:
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=8 * heads, n_head=heads, attn_implementation="eager")
    theirs = BloomAttention(config, layer_idx=0).eval()
    torch.nn.init.eye_(theirs.dense.weight)
    torch.nn.init.zeros_(theirs.dense.bias)
    theirs.query_key_value.weight.normal_(std=0.3)
    x = torch.randn(2, 40, 8 * heads)
    real = torch.ones(2, 40, dtype=torch.bool)
    if padded:
        real[0, :7] = False
    seen = torch.ones(40, 40, dtype=torch.bool).tril() & real[:, None, None]
    hidden = torch.zeros(2, 1, 40, 40).masked_fill(~seen, torch.finfo(torch.float32).min)
    bias = build_alibi_tensor(real.long(), heads, torch.float32)
    expected = theirs(x, torch.zeros_like(x), bias, hidden)[0] * real[..., None]
    q, k, v = theirs._reshape(theirs.query_key_value(x))
    found = attention(
        q, k, v, is_causal=True, key_padding_mask=real, alibi_slopes=slopes(heads), backend=backend
    )
    found = found.transpose(1, 2).flatten(2) * real[..., None]
    # Values go to 3. BLOOM's bias is up to 28 larger, for the softmax to take off again.
    assert float((found - expected).abs().max()) < 2e-5
