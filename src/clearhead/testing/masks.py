"""Masks of every kind, as arguments of the operations and as what the oracles read.

Legend: B batch, H query heads, L queries, S keys.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clearhead.testing.oracles.softmax import visible

MASKS: tuple[str, ...] = (
    "none",
    "causal",
    "last",
    "padding",
    "documents",
    "dense",
    "per_head",
    "bias",
    "blind_rows",
)
MASKS += ("window", "window_of_one", "window_last", "window_both_ways", "window_of_real_documents")


@dataclass(frozen=True)
class Mask:
    """One mask.

    op:     arguments of `clearhead.functional`.
    oracle: arguments of `oracles.softmax.attention` and `oracles.differential.differential_attention`.
    keys_beyond_queries: S − L.
    """

    op: dict[str, Any] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)
    keys_beyond_queries: int = 0


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_mask(kind: str, batch: int, heads: int, queries: int, seed: int = 0) -> Mask:
    """The mask `kind`, one of `MASKS`, for `queries` queries.

    "last" is causal attention of the last queries over more keys; "blind_rows" has queries that see no key.
    """
    rng = torch.Generator().manual_seed(seed + 77)
    if kind == "none":
        return Mask()
    if kind == "causal":
        return Mask({"is_causal": True}, {"causal": True})
    if kind == "last":
        return Mask({"is_causal": True}, {"causal": True}, keys_beyond_queries=3)
    if kind == "padding":
        real = torch.ones(batch, queries, dtype=torch.bool)
        # Rows 0 and 1 of the first sequence then see nothing at all.
        real[0, :2] = False
        seen = visible(batch, queries, queries, key_padding=real)[:, None]
        return Mask({"is_causal": True, "key_padding_mask": real}, {"causal": True, "allowed": seen})
    if kind == "documents":
        number = (torch.arange(queries) >= queries // 2).long().expand(batch, queries)
        seen = visible(batch, queries, queries, documents=number)[:, None]
        return Mask({"is_causal": True, "documents": number}, {"causal": True, "allowed": seen})
    if kind.startswith("window"):
        return _windowed(kind, batch, queries)
    if kind == "dense":
        seen = torch.rand(queries, queries, generator=rng) < 0.6
        seen |= torch.eye(queries, dtype=torch.bool)
        return Mask({"attn_mask": seen}, {"allowed": seen})
    if kind == "per_head":
        seen = torch.rand(batch, heads, queries, queries, generator=rng) < 0.6
        seen |= torch.eye(queries, dtype=torch.bool)
        return Mask({"attn_mask": seen}, {"allowed": seen})
    if kind == "bias":
        bias = torch.randn(batch, heads, queries, queries, generator=rng, dtype=torch.float64)
        bias[..., 0, 1] = float("-inf")
        return Mask({"attn_mask": bias}, {"bias": bias.clamp(min=-1e9), "allowed": bias > -1e9})
    if kind != "blind_rows":
        raise ValueError(f"unknown mask {kind!r}; known: {', '.join(MASKS)}")
    seen = torch.rand(batch, heads, queries, queries, generator=rng) < 0.5
    seen[0, :, 1] = False
    seen[:, 0, 3] = False
    return Mask({"attn_mask": seen}, {"allowed": seen})


def _windowed(kind: str, batch: int, queries: int) -> Mask:
    extra = {"window_last": 3, "window_of_real_documents": 4}.get(kind, 0)
    keys, causal = queries + extra, kind != "window_both_ways"
    window = 1 if kind == "window_of_one" else 3
    op: dict[str, Any] = {"is_causal": causal, "window": window}
    seen = visible(batch, queries, keys, window=window)
    if kind == "window_of_real_documents":
        number = ((torch.arange(keys) >= 3).long() + (torch.arange(keys) >= keys - 2)).repeat(batch, 1)
        number[-1] = 7
        real = torch.ones(batch, keys, dtype=torch.bool)
        # The first query of the first sequence then sees nothing at all.
        real[0, 2 : extra + 1] = False
        op |= {"documents": number, "key_padding_mask": real}
        parts: dict[str, Any] = {"documents": number[:, extra:], "key_documents": number, "key_padding": real}
        seen = visible(batch, queries, keys, window=window, **parts)
    return Mask(op, {"causal": causal, "allowed": seen[:, None]}, keys_beyond_queries=extra)


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating-point masks in `dtype`; everything else as it is."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
