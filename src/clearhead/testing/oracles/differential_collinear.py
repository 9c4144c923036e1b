"""Differential attention whose streams are collinear: V1's and V2's difference of softmaxes of CoCA's scores.

Streams lie as in `differential`: of the 2H query heads, 2i is the signal and 2i + 1 the noise of output head i. V1 has
a key head, hence a t, per stream; V2's two streams read one. λ, head norm and factor are those of `differential`.
"""

import torch
from torch import Tensor

from .collinear import collinear_map
from .rotary import Turning
from .softmax import apply_map, per_head


def differential_collinear_map(
    q: Tensor,
    t: Tensor,
    groups: int,
    lam: float | Tensor,
    mode: str,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    causal: bool = False,
    allowed: Tensor | None = None,
    base: float | Turning = 10_000.0,
) -> Tensor:
    """(B, H, L, S): softmax(a(q_1, t_1)/√D) − λ softmax(a(q_2, t_2)/√D), a one of `collinear.SCORES`.

    q (B, 2H, L, D) is neither tied nor rotated; t is `collinear_t` of the key projection, 2·groups heads (a pair per
    group) or `groups` heads (both streams read the same one). Head i reads group i // (H / groups).
    """
    B, heads, L, _ = q.shape
    H, S = heads // 2, t.shape[2]
    assert t.shape[1] in (groups, 2 * groups) and H % groups == 0
    lam = torch.as_tensor(lam, dtype=q.dtype).expand(B, H, L, 1)
    allowed = per_head(allowed, (B, H, L, S))
    out = []
    for i in range(H):
        g = i // (H // groups)
        signal_key, noise_key = (g, g) if t.shape[1] == groups else (2 * g, 2 * g + 1)
        seen = None if allowed is None else allowed[:, [i]]
        signal, noise = (
            collinear_map(
                q[:, [head]],
                t[:, [key]],
                mode,
                query_positions,
                key_positions,
                causal=causal,
                allowed=seen,
                base=base,
            )
            for head, key in ((2 * i, signal_key), (2 * i + 1, noise_key))
        )
        out.append(signal - lam[:, [i]] * noise)
    return torch.cat(out, dim=1)


def differential_collinear_attention(
    q: Tensor,
    t: Tensor,
    v: Tensor,
    lam: float | Tensor,
    mode: str,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    causal: bool = False,
    allowed: Tensor | None = None,
    base: float | Turning = 10_000.0,
) -> Tensor:
    """q (B, 2H, L, D), t (B, 2G or G, S, D), v (B, G, S, E) -> (B, H, L, E)."""
    weights = differential_collinear_map(
        q, t, v.shape[1], lam, mode, query_positions, key_positions, causal=causal, allowed=allowed, base=base
    )
    return apply_map(weights, v)
