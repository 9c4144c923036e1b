"""What is not finite reaches the queries that see it and no other, in every backend, dtype and length."""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

import clearhead.nn as nn
from clearhead.core.masks import MaskSpec
from clearhead.functional import attention, differential_attention
from clearhead.kernels.cpu import library
from tests.contracts.support import rand
from tests.oracles import softmax

BACKENDS = ["auto", "eager", "sdpa", "flex", "cpu"]
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 8e-3}
HIDDEN = ["causal", "documents", "window", "dense", "bias", "causal and padding"]
B, H, G, D = 2, 4, 2, 8


def masks(kind: str, length: int, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """Arguments, and what each query sees (B, 1, L, S)."""
    square = torch.ones(length, length, dtype=torch.bool).tril()
    numbers = (torch.arange(length) * 3 // length).repeat(B, 1)
    real = torch.ones(B, length, dtype=torch.bool)
    real[0, 0] = False
    arguments: dict[str, Any]
    arguments, seen = {
        "causal": ({"is_causal": True}, {"causal": True}),
        "documents": ({"documents": numbers}, {"documents": numbers}),
        "window": ({"window": 2}, {"window": 2}),
        "dense": ({"attn_mask": square}, {"causal": True}),
        "bias": (
            {"attn_mask": torch.zeros(length, length, dtype=dtype).masked_fill(~square, -math.inf)},
            {"causal": True},
        ),
        "causal and padding": (
            {"is_causal": True, "key_padding_mask": real},
            {"causal": True, "key_padding": real},
        ),
    }[kind]
    return arguments, softmax.visible(B, length, length, **seen)[:, None]  # type: ignore[arg-type]


def skip_unless_possible(backend: str, dtype: torch.dtype, kind: str) -> None:
    if backend == "cpu" and library.missing() is not None:
        pytest.skip(str(library.missing()))
    if (
        (backend == "cpu" and dtype not in (torch.float32, torch.bfloat16))
        or (backend == "flex" and dtype == torch.float64)
        or (backend in ("cpu", "flex") and kind in ("dense", "bias"))
    ):
        pytest.skip("not computed by this backend")


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_who_does_not_see_it_is_not_touched(backend: str, kind: str, dtype: torch.dtype, length: int) -> None:
    skip_unless_possible(backend, dtype, kind)
    arguments, seen = masks(kind, length, dtype)
    q, k, v = (rand(B, heads, length, D, seed=heads + i).to(dtype) for i, heads in enumerate((H, G, G)))
    expected = softmax.attention(q.double(), k.double(), v.double(), allowed=seen)
    at = length // 2
    sees = seen[..., at].expand(B, H, length)
    assert bool(sees.any()) and not bool(sees.all())
    for spoilt, garbage in (("k", math.nan), ("k", math.inf), ("v", math.nan), ("v", -math.inf)):
        keys, values = k.clone(), v.clone()
        (keys if spoilt == "k" else values)[:, :, at] = garbage
        with torch.no_grad():
            found = attention(q, keys, values, backend=backend, **arguments)
        assert float((found.double() - expected)[~sees].abs().max()) <= DTYPES[dtype]
        if spoilt == "v" or garbage != garbage:
            assert not bool(found[sees].isfinite().any())


@pytest.mark.parametrize("backend", ["eager", "sdpa", "cpu"])
def test_gradients_of_queries_stay_apart_too(backend: str) -> None:
    skip_unless_possible(backend, torch.float32, "documents")
    arguments, seen = masks("documents", 12, torch.float32)
    sees = seen[..., 6].expand(B, H, 12)
    inputs = [rand(B, h, 12, D, seed=h + i) for i, h in enumerate((2 * H, 2 * G, G))]
    clean = [x.float().requires_grad_() for x in inputs]
    (expected,) = torch.autograd.grad(
        differential_attention(*clean, 0.5, backend="eager", **arguments).sum(), clean[:1]
    )
    for at in (1, 2):
        leaves = [x.float() for x in inputs]
        leaves[at][:, :, 6] = math.nan
        leaves = [x.requires_grad_() for x in leaves]
        out = differential_attention(*leaves, 0.5, backend=backend, **arguments)
        (found,) = torch.autograd.grad(out.sum(), leaves[:1])
        rows = sees.repeat_interleave(2, 1)
        assert float((found - expected)[~rows].abs().max()) <= 1e-5
        assert not bool(found[rows].isfinite().all(-1).any())


def test_a_later_token_does_not_change_a_layer_s_output_or_map() -> None:
    """One answer over lengths and dtypes: "auto" changes its backend among these."""
    for length, dtype in ((3, torch.float32), (40, torch.float32), (40, torch.float64)):
        layer = nn.DifferentialAttentionV2(16, 2).to(dtype)
        x = rand(1, length, 16, seed=length).to(dtype)
        with torch.no_grad():
            clean, map_ = layer(x, is_causal=True), layer.effective_map(x, is_causal=True)
            x[:, -1] = math.nan
            assert torch.allclose(layer(x, is_causal=True)[:, :-1], clean[:, :-1], atol=1e-5)
            assert torch.allclose(
                layer.effective_map(x, is_causal=True)[:, :, :-1], map_[:, :, :-1], atol=1e-5
            )


def test_rows_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under every part of a mask, also one that is its own for each query."""
    from clearhead.core import hidden

    q, k, v = (rand(B, heads, 9, D, seed=heads) for heads in (H, G, G))
    v[:, :, 8] = math.nan
    bias = rand(B, H, 9, 9, seed=3)
    arguments: dict[str, Any] = {
        "is_causal": True,
        "window": 4,
        "attn_mask": bias,
        "alibi_slopes": torch.rand(H, generator=torch.Generator().manual_seed(1)),
        "backend": "eager",
    }
    whole = attention(q, k, v, **arguments)
    monkeypatch.setattr(hidden, "_ROWS", 2)
    assert torch.allclose(attention(q, k, v, **arguments), whole, equal_nan=True, atol=1e-12)
    assert bool(whole[:, :, :8].isfinite().all()) and bool(whole[:, :, 8].isnan().all())
    v[:, :, 8] = 0.0
    assert torch.allclose(attention(q, k, v, **arguments)[:, :, :8], whole[:, :, :8], atol=1e-12)


LARGE = {"-1e9": -1e9, "least float32": torch.finfo(torch.float32).min, "1e9": 1e9}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_large_numbers_in_a_mask_stay_numbers(backend: str, dtype: torch.dtype, name: str) -> None:
    """A row of nothing else is softmax of the logits; beside others the large ones hide, or are all there is."""
    length = 6
    q, k, v = (rand(1, 2, length, D, seed=i).to(dtype) for i in range(3))
    bias = torch.zeros(length, length)
    bias[1], bias[3, 2:4] = LARGE[name], LARGE[name]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    # What is added to all keys of a row does not change it.
    bias_of_row = bias.clone()
    bias_of_row[1] = 0.0
    allowed = bias_of_row.abs() < 1e8
    if LARGE[name] > 0:
        allowed[3] = ~allowed[3]
    expected = softmax.attention(*leaves, allowed=allowed)
    cotangent = rand(1, 2, length, D, seed=7).to(dtype)
    found_leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    found = attention(*found_leaves, attn_mask=bias, backend=backend)
    gradients = torch.autograd.grad(found, found_leaves, cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double())
    for a, b in zip((found, *gradients), (expected, *wanted), strict=True):
        assert float((a.double() - b).detach().abs().max()) <= 4 * DTYPES[dtype]


def test_some_rows_of_a_mask_are_those_of_the_whole() -> None:
    """With every part that a mask may have."""
    generator = torch.Generator().manual_seed(4)
    queries, keys = 5, 9
    parts: dict[str, Any] = {
        "is_causal": True,
        "window": 6,
        "key_padding": torch.rand(B, keys, generator=generator) < 0.8,
        "documents": torch.randint(0, 2, (B, keys), generator=generator),
        "dense": torch.randn(B, 1, queries, keys, generator=generator),
        "slopes": torch.rand(H, generator=generator),
        "places": (
            torch.randint(0, 9, (B, queries), generator=generator),
            torch.randint(0, 9, (B, keys), generator=generator),
        ),
    }
    assert set(parts) == {field.name for field in fields(MaskSpec)} - {"offset", "sparse"}
    for offset in (None, 2, torch.tensor(3)):
        mask = MaskSpec(offset=offset, **parts)
        whole = mask.materialise(queries, keys, torch.float64, torch.device("cpu"))
        for first, count in ((0, 2), (2, 3)):
            some = mask.rows(first, count, queries, keys).materialise(
                count, keys, torch.float64, whole.device
            )
            assert torch.equal(some, whole[:, :, first : first + count])
