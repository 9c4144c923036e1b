"""Attention as functions.

Legend: B batch, H query heads, G key-value heads, L queries, S keys, D key width, E value width.
"""

import numbers
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clearhead.core.attend import MIXES, Mixing, attend, prepare, problem_of
from clearhead.core.dispatch import automatic_backends, load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.sparse import BlockSparse
from clearhead.core.streams import Streams

__all__ = ["BlockSparse", "attention", "differential_attention"]

# Loaded here, so that a first call inside `torch.compile` has nothing left to import.
automatic_backends()

LARGEST = sys.float_info.max


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | Tensor | None = None,
    block_sparse: BlockSparse | Mapping[str, Any] | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, grouped-query.

    q (B, H, L, D), k (B, G, S, D), v (B, G, S, E) -> (B, H, L, E); G divides H and head h reads group h // (H // G).
    is_causal:        a query sees keys up to its own position; with L < S the queries are the LAST L positions.
    key_padding_mask: (B or 1, S) bool, True where a key is real.
    documents:        (B or 1, S) integers; a query sees keys of its own document only.
    window:           a query sees keys fewer than this many positions away: under is_causal the last `window`, its own
        among them, otherwise as many to either side.
    attn_mask:        (L, S) or (B, H, L, S), where a 1 stands for any size; bool (True = visible) or added.
    alibi_slopes:     (H,) float32 or float64 constants: slope_h · |query's − key's position| is taken off the scaled
        logits of head h (`clearhead.positions.alibi.slopes` makes them).
    Masks combine by "and"; a query that sees no key gives zeros. What a hidden key and its value hold changes nothing,
    NaN and infinities included: under key_padding_mask everywhere, gradients too; hidden in another way on a CPU
    outside compiled graphs, for outputs and gradients of q (elsewhere 0 · NaN may reach queries of the same sequence).
    A mask's large finite numbers stay numbers: −1e9 for all keys of a row changes nothing.
    scale:            1/√D by default; a number of any sign, or a tensor of one, which gets its gradient.
    block_sparse:     blocks of keys may be left out, as a `BlockSparse` or a mapping of its fields says: with
        {"left_out": 0.01} no query loses more than a hundredth of its softmax. Backend cpu alone, without gradients.
    backend:          "auto", or the name of an engine or kernel, which runs it or raises ValueError with its reason.
    Every way to differentiate that PyTorch has gives the right derivative, or a named backend refuses it; "auto" takes
    one that can. (A second derivative through an ordinary graph is known too late: it wants backend="eager".)
    Raises ValueError, naming the argument, for what does not fit.

    Differs from `torch.nn.functional.scaled_dot_product_attention` in two things: bottom-right causal alignment, and
        GQA without a flag.
    """
    _check(q, k, v, 1, 1)
    mask = MaskSpec(
        is_causal=is_causal,
        window=window,
        key_padding=key_padding_mask,
        documents=documents,
        dense=attn_mask,
        slopes=alibi_slopes,
        sparse=BlockSparse.of(block_sparse),
    )
    return _run(Streams((q,), (k,), v), "single", mask, scale, backend)


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
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | Tensor | None = None,
    block_sparse: BlockSparse | Mapping[str, Any] | None = None,
    backend: str = "auto",
) -> Tensor:
    """(softmax(scale · q1 k1ᵀ + mask) − λ softmax(scale · q2 k2ᵀ + mask)) v: both V1 and V2 of DIFF Transformer.

    q:   (B, 2H, L, D): adjacent heads pair up, 2i is the signal and 2i + 1 the noise of head i.
    k:   (B, 2G, S, D): own keys for each stream, adjacent pairs again (V1), or (B, G, S, D): shared keys (V2).
    v:   (B, G, S, E): G divides H, head i reads group i // (H // G).
    lam: a number or a tensor broadcastable to (B, H, L, 1): per call, per head or per token, with its gradient.
    Returns (B, H, L, E), without V1's norm and factor. Both streams see the same keys, and those of one
    head share its slope; the rest as for `attention`.

    Source: arXiv 2410.05258, equation 1; V2: Microsoft 2026. Differs from the released naive code, which pairs keys
        wrongly under GQA.
    """
    _check(q, k, v, 2, 2)
    streams = q.unflatten(1, (-1, 2)).unbind(2)
    keys = (k,) if k.shape[1] == v.shape[1] else k.unflatten(1, (-1, 2)).unbind(2)
    gate = _gate(lam, q.device)
    if gate.ndim < 4:
        gate = gate.reshape((1,) * (4 - gate.ndim) + tuple(gate.shape))
    expected = (q.shape[0], q.shape[1] // 2, q.shape[2], 1)
    if gate.ndim > 4 or any(size not in (1, full) for size, full in zip(gate.shape, expected, strict=True)):
        raise ValueError(
            f"lam has shape {tuple(lam.shape) if isinstance(lam, Tensor) else ()}; it must broadcast to {expected}"
        )
    mask = MaskSpec(
        is_causal=is_causal,
        window=window,
        key_padding=key_padding_mask,
        documents=documents,
        dense=attn_mask,
        slopes=alibi_slopes,
        sparse=BlockSparse.of(block_sparse),
    )
    return _run(Streams(tuple(streams), tuple(keys), v, gate), "difference", mask, scale, backend)


def _gate(lam: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(lam, Tensor):
        if not lam.is_floating_point():
            raise ValueError(f"lam must be floating point, not {lam.dtype}")
        if lam.device != device:
            raise ValueError(f"lam is on {lam.device}, q on {device}; they must agree")
        return lam
    if not _is_number(lam):
        finite = "finite number" if isinstance(lam, float) else "number"
        raise ValueError(f"lam must be a {finite} or a tensor, not {lam!r}")
    # Not `torch.tensor`, which waits for a device to take the number.
    return torch.full((), float(lam), device=device, dtype=torch.float64)


def _is_number(x: object) -> bool:
    if isinstance(x, bool) or not isinstance(x, (int, float, numbers.Real)):
        return False
    # NumPy's numbers are real ones too. Compared and not asked: `torch.compile` can follow that for one that changes.
    value = x if isinstance(x, (int, float)) else float(x)
    return -LARGEST <= value <= LARGEST


def _scaled(heads: Streams, scale: float | Tensor | None) -> tuple[Streams, float]:
    """The heads and the number that their logits are to be scaled by; a tensor's gradient goes through the queries."""
    if scale is None:
        return heads, float(heads.q[0].shape[3] ** -0.5)
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or not scale.is_floating_point():
            raise ValueError(
                f"scale must be one real number, not a tensor of shape {tuple(scale.shape)} in {scale.dtype}"
            )
        # One number may stay on the host, where it is read without waiting for a device.
        if scale.device != heads.q[0].device and (scale.ndim or not scale.is_cpu):
            raise ValueError(f"scale is on {scale.device}, q on {heads.q[0].device}; they must agree")
        wide = torch.float64 if heads.q[0].dtype == torch.float64 else torch.float32
        factor = scale.reshape(()).to(wide)
        return replace(heads, q=tuple((q.to(wide) * factor).to(q.dtype) for q in heads.q)), 1.0
    if not _is_number(scale):
        raise ValueError(f"scale must be a finite number, not {scale!r}")
    return heads, float(scale)


def _run(
    heads: Streams, mixing: Mixing, mask: MaskSpec, scale: float | Tensor | None, backend: str
) -> Tensor:
    batch, count, queries, _ = heads.q[0].shape
    keys = heads.v.shape[2]
    mask.validate(batch, count, queries, keys, heads.v.device)
    mask = mask.within(queries, keys)
    heads, factor = _scaled(heads, scale)
    automatic = backend == "auto"
    backends = automatic_backends() if automatic else (load_backend(backend),)
    prepared = prepare(backends, problem_of(heads, mask, mixing), mask, automatic)
    return attend(heads, prepared, factor, MIXES[mixing])[0]


def _check(q: Tensor, k: Tensor, v: Tensor, query_streams: int, key_streams: int) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, not {type(value).__name__}")
        if value.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, tokens, width), not shape {tuple(value.shape)}"
            )
        if 0 in value.shape[1:]:
            raise ValueError(f"{name} is empty: its shape is {tuple(value.shape)}")
        if not value.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {value.dtype}")
        if value.layout != torch.strided:
            raise ValueError(f"{name} must be dense, not {value.layout}: call to_dense() on it first")
        if value.dtype != q.dtype or value.device != q.device:
            raise ValueError(
                f"{name} is {value.dtype} on {value.device}, q is {q.dtype} on {q.device}; they must agree"
            )
        if value.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch size {value.shape[0]}, q has {q.shape[0]}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q is {q.shape[3]} wide and k {k.shape[3]}; they must agree")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k has {k.shape[2]} tokens and v {v.shape[2]}; they must agree")
    if q.shape[1] % query_streams:
        raise ValueError(
            f"q must have an even number of heads, a signal and a noise head each, not {q.shape[1]}"
        )
    groups, heads = v.shape[1], q.shape[1] // query_streams
    if k.shape[1] not in (groups, key_streams * groups):
        allowed = f"{groups}" if key_streams == 1 else f"{groups} (shared) or {key_streams * groups} (own)"
        raise ValueError(f"k has {k.shape[1]} heads and v {groups}; k must have {allowed}")
    if heads % groups:
        raise ValueError(f"v has {groups} key-value heads, which do not divide the {heads} output heads of q")
