"""Scaled dot-product attention (Vaswani et al. 2017), its masks, and grouped-query heads."""

import math

import torch
from torch import Tensor


def visible(
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | None = None,
    key_padding: Tensor | None = None,
    documents: Tensor | None = None,
    key_documents: Tensor | None = None,
) -> Tensor:
    """(B, L, S) bool, True where query l may look at key s.

    Fewer queries than keys under `causal` or `window` means that the queries are the last L positions. A window
    of w shows key j to a query at position p if p - w < j < p + w. `key_padding` is (B, S), True for a real
    token. `documents` is (B, L) and `key_documents` (B, S), by default the same: a token sees its own document
    only.
    """
    see = torch.ones(batch, queries, keys, dtype=torch.bool)
    theirs = documents if key_documents is None else key_documents
    for b in range(batch):
        for i in range(queries):
            for j in range(keys):
                position = i + keys - queries
                if causal and j > position:
                    see[b, i, j] = False
                if window is not None and not position - window < j < position + window:
                    see[b, i, j] = False
                if key_padding is not None and not bool(key_padding[b, j]):
                    see[b, i, j] = False
                if documents is not None and theirs is not None and documents[b, i] != theirs[b, j]:
                    see[b, i, j] = False
    return see


def softmax_rows(scores: Tensor, see: Tensor) -> Tensor:
    """exp(s_j) / Σ exp(s_j) over the visible keys of each row of (L, S); a row that sees nothing is zero."""
    rows = []
    for i in range(scores.shape[0]):
        if not bool(see[i].any()):
            rows.append(torch.zeros_like(scores[i]))
            continue
        top = scores[i][see[i]].max().detach()
        weight = torch.where(
            see[i], torch.exp(torch.where(see[i], scores[i], top) - top), torch.zeros_like(scores[i])
        )
        rows.append(weight / weight.sum())
    return torch.stack(rows)


def per_head(mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """A mask or bias broadcast to (B, H, L, S)."""
    if mask is None:
        return None
    while mask.dim() < 4:
        mask = mask.unsqueeze(0 if mask.dim() == 2 else 1)
    return mask.expand(shape)


def attention_map(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """(B, H, L, S): softmax(scale · q kᵀ + bias), query head h on key head h // (H / G).

    The scale is 1/√D unless given. `allowed` (bool, True = visible) and `bias` are (L, S) to (B, H, L, S).
    """
    B, H, L, D = q.shape
    G, S = k.shape[1], k.shape[2]
    assert H % G == 0, "every key head serves the same number of query heads"
    scale = 1 / math.sqrt(D) if scale is None else scale
    see = visible(B, L, S, causal=causal)
    allowed = per_head(allowed, (B, H, L, S))
    bias = per_head(bias, (B, H, L, S))
    maps = []
    for b in range(B):
        for h in range(H):
            scores = scale * torch.einsum("ld,sd->ls", q[b, h], k[b, h // (H // G)])
            if bias is not None:
                scores = scores + bias[b, h]
            maps.append(softmax_rows(scores, see[b] if allowed is None else see[b] & allowed[b, h]))
    return torch.stack(maps).view(B, H, L, S)


def apply_map(weights: Tensor, v: Tensor) -> Tensor:
    """(B, H, L, E): each head's map times the values of the key-value head it reads."""
    B, H, L, _ = weights.shape
    G = v.shape[1]
    heads = [
        torch.einsum("ls,se->le", weights[b, h], v[b, h // (H // G)]) for b in range(B) for h in range(H)
    ]
    return torch.stack(heads).view(B, H, L, v.shape[3])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v: q (B, H, L, D), k (B, G, S, D), v (B, G, S, E) -> (B, H, L, E)."""
    return apply_map(attention_map(q, k, causal=causal, allowed=allowed, bias=bias, scale=scale), v)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    y = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight
