"""A whole layer of grouped differential attention: several signal heads take away the map of one noise head.

With H signal heads, N noise heads, G key-value heads (G divides N, N divides H) and width d, head h is

    o_h = softmax(q1_h k1_gᵀ/√d) v_g − λ_h softmax(q2_n k2_gᵀ/√d) v_g,      n = h // (H / N),  g = h // (H / G)

Rows of q_proj: the signal heads, then the noise heads. Rows of k_proj: the G keys of the signal, then those of the
noise where it has its own. `lam` is (H,). Queries and keys turn (RoPE).
"""

import math

import torch
from torch import Tensor

from .layers import heads_of, merge
from .rotary import rotate
from .softmax import softmax_rows, visible


def grouped_differential(
    weights: dict[str, Tensor],
    x: Tensor,
    *,
    signal_heads: int,
    noise_heads: int,
    groups: int,
    width: int,
    causal: bool = False,
    window: int | None = None,
    key_padding: Tensor | None = None,
    documents: Tensor | None = None,
    allowed: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, L, d_model) and effective map (B, H, L, L) of x (B, L, d_model); `allowed` is bool, (L, L)."""
    B, L, _ = x.shape
    positions = torch.arange(L) if positions is None else positions
    q = rotate(heads_of(x, weights["q_proj"], width), positions)
    k = rotate(heads_of(x, weights["k_proj"], width), positions)
    v_proj = weights["v_proj"]
    v = heads_of(x, v_proj, v_proj.shape[0] // groups)
    see = visible(B, L, L, causal=causal, window=window, key_padding=key_padding, documents=documents)
    if allowed is not None:
        see = see & allowed

    def one_map(b: int, query: int, key: int) -> Tensor:
        scores = torch.einsum("ld,sd->ls", q[b, query], k[b, key]) / math.sqrt(width)
        return softmax_rows(scores, see[b])

    maps, outputs = [], []
    for b in range(B):
        for h in range(signal_heads):
            n, g = h // (signal_heads // noise_heads), h // (signal_heads // groups)
            own = groups if k.shape[1] == 2 * groups else 0
            signal, noise = one_map(b, h, g), one_map(b, signal_heads + n, own + g)
            maps.append(signal - weights["lam"][h] * noise)
            outputs.append(torch.einsum("ls,se->le", maps[-1], v[b, g]))
    out = torch.stack(outputs).view(B, signal_heads, L, -1)
    return torch.einsum("bli,oi->blo", merge(out), weights["o_proj"]), torch.stack(maps).view(B, -1, L, L)
