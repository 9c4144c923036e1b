"""Differential and softmax attention in one fused Triton kernel, forward, backward and decoding.

    from kernels import get_kernel
    attention = get_kernel("OWNER/clearhead-attention", version=0, trust_remote_code=True)
    out = attention.differential_attention(q, k, v, lam, is_causal=True)

The kernels of the clearhead package, which also has the layers and models around them. Linear memory; deterministic;
float16, bfloat16 and float32; compute capability 8.0 and higher, and gfx942. What they are proven by, and that nothing
has been timed, is said in clearhead's documentation: docs/gpu-kernel.md.
"""

import torch
from torch import Tensor

from . import ops as _registered  # noqa: F401
from ._ops import ops

__all__ = ["attention", "differential_attention"]
__version__ = "@VERSION@"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, grouped-query: q (B, H, L, D), k (B, G, S, D), v (B, G, S, E) -> (B, H, L, E).

    is_causal:        a query sees keys up to its own position; with L < S the queries are the LAST L positions.
    key_padding_mask: (B or 1, S) bool, True where a key is real.
    documents:        (B or 1, S) integers; a query sees keys of its own document only.
    window:           a query sees keys fewer than this many positions away.
    alibi_slopes:     (H,) float32 constants: slope_h · distance is taken off head h's scaled logits.
    scale:            1/√D by default.
    Raises ValueError, naming the argument, for what does not fit.
    """
    return _run((q,), (k,), v, None, is_causal, key_padding_mask, documents, window, alibi_slopes, scale)


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: float | Tensor,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """(softmax(scale · q1 k1ᵀ + mask) − λ softmax(scale · q2 k2ᵀ + mask)) v: the Differential Transformer, V1 and V2.

    q:   (B, 2H, L, D): heads 2i and 2i + 1 are the signal and the noise of head i.
    k:   (B, 2G, S, D): own keys for each stream, adjacent pairs again (V1), or (B, G, S, D): shared keys (V2).
    v:   (B, G, S, E), E up to 512.    lam: a number, or a tensor that broadcasts to (B, H, L, 1), with its gradient.
    Returns (B, H, L, E). The rest as for `attention`.
    """
    if q.ndim != 4 or q.shape[1] % 2:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected (batch, 2 · heads, queries, width)")
    streams = tuple(q.unflatten(1, (-1, 2)).unbind(2))
    paired = k.ndim == v.ndim == 4 and k.shape[1] == 2 * v.shape[1]
    keys = tuple(k.unflatten(1, (-1, 2)).unbind(2)) if paired else (k,)
    if not isinstance(lam, Tensor):
        lam = torch.full((), float(lam), device=q.device)
    gate = lam.reshape((1,) * (4 - lam.ndim) + tuple(lam.shape)).float()
    size = (q.shape[0], q.shape[1] // 2, q.shape[2], 1)
    try:
        gate = gate.expand(size)
    except RuntimeError:
        raise ValueError(f"lam has shape {tuple(lam.shape)}, which does not broadcast to {size}") from None
    return _run(streams, keys, v, gate, is_causal, key_padding_mask, documents, window, alibi_slopes, scale)


def _run(
    q: tuple[Tensor, ...],
    k: tuple[Tensor, ...],
    v: Tensor,
    gate: Tensor | None,
    is_causal: bool,
    padding: Tensor | None,
    documents: Tensor | None,
    window: int | None,
    slopes: Tensor | None,
    scale: float | None,
) -> Tensor:
    for name, x in (("q", q[0]), ("k", k[0]), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (batch, heads, tokens, width)")
        if not x.numel():
            raise ValueError(f"{name} is empty: its shape is {tuple(x.shape)}")
    batch, heads, queries, width = q[0].shape
    groups, keys = v.shape[1], v.shape[2]
    for name, x, size in (
        ("k", k[0], (batch, groups, keys, width)),
        ("v", v, (batch, groups, keys, v.shape[3])),
    ):
        if tuple(x.shape) != size or x.dtype != q[0].dtype or x.device != q[0].device:
            raise ValueError(
                f"{name}: {tuple(x.shape)} of {x.dtype} on {x.device}; expected {size} of {q[0].dtype} on {q[0].device}"
            )
    if q[0].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q is of {q[0].dtype}; expected float16, bfloat16 or float32")
    if not groups or heads % groups:
        raise ValueError(f"q has {heads} heads a stream, no multiple of the {groups} key-value heads")
    if width > 256 or v.shape[3] > 512:
        raise ValueError(f"keys may be 256 wide and values 512, not {width} and {v.shape[3]}")
    if queries > keys and (is_causal or window is not None or documents is not None):
        raise ValueError(f"{queries} queries and {keys} keys: there must be at least as many keys")
    for name, x in (("key_padding_mask", padding), ("documents", documents)):
        if x is not None and (x.ndim != 2 or x.shape[0] not in (1, batch) or x.shape[1] != keys):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({batch}, {keys})")
    if padding is not None and padding.dtype != torch.bool:
        raise ValueError(f"key_padding_mask must be bool, True where a key is real, not {padding.dtype}")
    if documents is not None and (documents.is_floating_point() or documents.dtype == torch.bool):
        raise ValueError(f"documents must hold integers, not {documents.dtype}")
    # 0 is what the operator takes for no window, and it reads a slope for every head unasked.
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}: a query sees its own position")
    if slopes is not None and tuple(slopes.shape) != (heads,):
        raise ValueError(f"alibi_slopes has shape {tuple(slopes.shape)}; expected ({heads},)")
    tensors = [x for x in (*q, *k, v, gate) if x is not None]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    out, _, _, _ = ops.triton_attention(
        *(q[0], q[1] if len(q) == 2 else None, k[0], k[1] if len(k) == 2 else None, v, gate, padding),
        None if documents is None else documents.long(),
        None,
        None if slopes is None else slopes.to(v.device, torch.float32),
        *(None, None, keys - queries, window or 0, is_causal, width**-0.5 if scale is None else scale),
        *(0.0, 1.0, False, keep),
    )
    return out
