"""Differential Transformer: V1 (arXiv 2410.05258, equations 1 to 3) and V2 (Microsoft, January 2026).

Streams lie side by side: of the 2H query heads, 2i is the signal and 2i + 1 the noise of output head i. V1
has a key head per stream, paired in the same way, and one value head of twice the width per pair; V2's two
streams read one key-value head.
"""

import math

import torch
from torch import Tensor

from .softmax import apply_map, attention_map, per_head, rms_norm


def lambda_init(layer: int) -> float:
    """0.8 − 0.6 exp(−0.3 (l − 1)) with l counted from 1, that is `layer` counted from 0."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


def lambda_value(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, initial: float) -> Tensor:
    """Equation 2: exp(λ_q1 · λ_k1) − exp(λ_q2 · λ_k2) + λ_init."""
    return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + initial


def differential_map(
    q: Tensor,
    k: Tensor,
    groups: int,
    lam: float | Tensor,
    *,
    causal: bool = False,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """(B, H, L, S): softmax(Q1 K1ᵀ/√d) − λ softmax(Q2 K2ᵀ/√d) for each of H output heads.

    k has 2·groups heads (a pair per group) or `groups` heads (both streams read the same one). Head i reads
    group i // (H / groups). λ is a number or broadcasts to (B, H, L, 1). Masks hold for both streams.
    """
    B, heads, L, _ = q.shape
    H, S = heads // 2, k.shape[2]
    assert k.shape[1] in (groups, 2 * groups) and H % groups == 0
    lam = torch.as_tensor(lam, dtype=q.dtype).expand(B, H, L, 1)
    allowed = per_head(allowed, (B, H, L, S))
    bias = per_head(bias, (B, H, L, S))
    out = []
    for i in range(H):
        g = i // (H // groups)
        signal_key, noise_key = (g, g) if k.shape[1] == groups else (2 * g, 2 * g + 1)
        one = slice(i, i + 1)
        streams = [
            attention_map(
                q[:, [head]],
                k[:, [key]],
                causal=causal,
                allowed=None if allowed is None else allowed[:, one],
                bias=None if bias is None else bias[:, one],
                scale=scale,
            )
            for head, key in ((2 * i, signal_key), (2 * i + 1, noise_key))
        ]
        out.append(streams[0] - lam[:, one] * streams[1])
    return torch.cat(out, dim=1)


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: float | Tensor,
    *,
    causal: bool = False,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Equation 1: q (B, 2H, L, D), k (B, 2G or G, S, D), v (B, G, S, E) -> (B, H, L, E)."""
    weights = differential_map(q, k, v.shape[1], lam, causal=causal, allowed=allowed, bias=bias, scale=scale)
    return apply_map(weights, v)


def finish(out: Tensor, weight: Tensor, initial: float, eps: float = 1e-5) -> Tensor:
    """Equation 3: (1 − λ_init) · RMSNorm(head), each head by itself over its 2d channels.

    One weight serves all heads. Appendix G calls the factor the norm's scale γ: the ablation without norm has neither.
    """
    return (1 - initial) * rms_norm(out, weight, eps)
