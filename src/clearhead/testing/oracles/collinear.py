"""Collinear Constrained Attention (arXiv 2309.08646 v3): scores as the paper writes them.

exact:  equations 7 to 9: the key of token n as seen by query m is q_m ∘ t_n, rotated to n: L × S × D keys
slack:  equation 10 with q free: q_m ∘ rotated t_n
strict: equation 10 under constraint 11: q is the same on both components of each rotary pair

t is the same on both components of a pair and not negative (equation 6): the activation of the average of the
two halves, which is how the authors' code ties it. Pairs are components (j, j + D/2).
"""

import math

import torch
from torch import Tensor

from .rotary import Turning, rotate
from .softmax import apply_map, per_head, softmax_rows, visible


def tie(x: Tensor) -> Tensor:
    """(..., D) -> (..., D): both components of each pair become their average."""
    half = x.shape[-1] // 2
    average = (x[..., :half] + x[..., half:]) / 2
    return torch.cat((average, average), dim=-1)


def collinear_t(projected: Tensor, activation: str = "relu") -> Tensor:
    """Equation 6: tie the pairs, then make them non-negative."""
    tied = tie(projected)
    if activation == "relu":
        return torch.where(tied > 0, tied, torch.zeros_like(tied))
    assert activation == "softplus"
    return torch.log1p(torch.exp(-tied.abs())) + torch.where(tied > 0, tied, torch.zeros_like(tied))


def exact_scores(
    q: Tensor, t: Tensor, query_positions: Tensor, key_positions: Tensor, base: float | Turning = 10_000.0
) -> Tensor:
    """Equation 9 for one head: a(m, n) = Re⟨f(q_m, m), f(q_m, n) ∘ t_n⟩; q (L, D), t (S, D) -> (L, S)."""
    L, S = q.shape[0], t.shape[0]
    rotated = rotate(q[None, None], query_positions, base)[0, 0]
    rows = []
    for m in range(L):
        same_query = q[m].expand(S, -1)[None, None]
        keys = rotate(same_query, key_positions, base)[0, 0] * t
        rows.append(torch.einsum("d,sd->s", rotated[m], keys))
    return torch.stack(rows)


def slack_scores(
    q: Tensor, t: Tensor, query_positions: Tensor, key_positions: Tensor, base: float | Turning = 10_000.0
) -> Tensor:
    """Equation 10 for one head: a(m, n) = Re⟨f(q_m, m), q_m ∘ f(t_n, n)⟩."""
    rotated_query = rotate(q[None, None], query_positions, base)[0, 0]
    rotated_t = rotate(t[None, None], key_positions, base)[0, 0]
    keys = q[:, None, :] * rotated_t[None, :, :]
    return torch.einsum("ld,lsd->ls", rotated_query, keys)


def strict_scores(
    q: Tensor, t: Tensor, query_positions: Tensor, key_positions: Tensor, base: float | Turning = 10_000.0
) -> Tensor:
    """Equation 10 with q tied (equation 11)."""
    return slack_scores(tie(q), t, query_positions, key_positions, base)


def expanded_scores(
    q: Tensor, t: Tensor, query_positions: Tensor, key_positions: Tensor, base: float = 10_000.0
) -> Tensor:
    """Equation 17: Σ_j t_j |q_j|² cos((m − n) θ_j), what equation 9 comes to."""
    half = q.shape[-1] // 2
    scores = torch.zeros(q.shape[0], t.shape[0], dtype=q.dtype)
    distance = query_positions[:, None].to(q.dtype) - key_positions[None, :].to(q.dtype)
    for j in range(half):
        square = q[:, j] ** 2 + q[:, j + half] ** 2
        scores = scores + square[:, None] * t[None, :, j] * torch.cos(
            distance * base ** (-2 * j / (2 * half))
        )
    return scores


SCORES = {"exact": exact_scores, "slack": slack_scores, "strict": strict_scores}


def collinear_map(
    q: Tensor,
    t: Tensor,
    mode: str,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    causal: bool = False,
    allowed: Tensor | None = None,
    scale: float | None = None,
    base: float | Turning = 10_000.0,
) -> Tensor:
    """(B, H, L, S) softmax of the scores times `scale`: 1/√D unless given, as in the released code.

    q is neither tied nor rotated, t is `collinear_t` of the key projection; positions are (B, L) and (B, S).
    """
    B, H, L, D = q.shape
    G, S = t.shape[1], t.shape[2]
    scale = 1 / math.sqrt(D) if scale is None else scale
    see = visible(B, L, S, causal=causal)
    allowed = per_head(allowed, (B, H, L, S))
    maps = []
    for b in range(B):
        for h in range(H):
            scores = scale * SCORES[mode](
                q[b, h], t[b, h // (H // G)], query_positions[b], key_positions[b], base
            )
            maps.append(softmax_rows(scores, see[b] if allowed is None else see[b] & allowed[b, h]))
    return torch.stack(maps).view(B, H, L, S)


def collinear_attention(
    q: Tensor,
    t: Tensor,
    v: Tensor,
    mode: str,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    causal: bool = False,
    allowed: Tensor | None = None,
    scale: float | None = None,
    base: float | Turning = 10_000.0,
) -> Tensor:
    weights = collinear_map(
        q, t, mode, query_positions, key_positions, causal=causal, allowed=allowed, scale=scale, base=base
    )
    return apply_map(weights, v)
