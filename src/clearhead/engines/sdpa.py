"""PyTorch's scaled_dot_product_attention.

Legend: B batch, H query heads, L queries, S keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from clearhead.core.dispatch import MASK_FEATURES, AttentionProblem, Caps, Engine
from clearhead.core.lowering import Lowering, SoftmaxCall, lower_for, lower_mask, lower_slopes
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import repeat_kv
from clearhead.engines.sdpa_kernels import is_masked, kernel_of, repeats_keys, takes_wide_values

_CAUSAL = "causal"
# Queries of one call under slopes: fewer see fewer keys in vain, more make fewer calls.
_ROWS = 512


@dataclass(frozen=True, slots=True)
class Band:
    """Some queries, the keys they may see, and the mask (1, H, rows, keys) for those queries in reverse order."""

    rows: slice
    keys: slice
    mask: Tensor


class Sdpa(Engine):
    """`torch.nn.functional.scaled_dot_product_attention` with native GQA.

    Its fused kernels want values as wide as keys. On CPU keys padded to the value's width are faster than two slices
    (one softmax instead of two, larger products: `benchmarks/`); elsewhere the slices keep the kernels for narrow
    heads. On CUDA `sdpa_kernels` has what PyTorch's own choice rests on: under a mask, and in float32, values up to 128
    wide go in as they are, and the key-value heads of groups are repeated, as PyTorch would write out every map.

    ALiBi on CPU only, whose kernels take a float32 mask beside any dtype; elsewhere a mask has the query's, and
    bfloat16 loses distances past 256. Where distance decides everything (causal or not, windows, any cache) the mask
    is a view of one row of L + S − 1 numbers a head, so memory stays linear, and causal or windowed attention runs in
    bands of 512 queries with the keys they may see. With padding, documents or a dense mask it is (B or 1, H, L, S).
    """

    name = "sdpa"
    takes_shared_rows = True

    def caps(self, device: str) -> Caps:
        # Its fused kernels have no forward-mode and no second derivatives, on any device.
        modes = frozenset({"grad", "vmap"})
        if device == "cpu":
            return Caps(wide_values="pad", modes=modes)
        return Caps(wide_values="split", masks=MASK_FEATURES - {"alibi"}, modes=modes)

    def refusal(self, problem: AttentionProblem) -> str | None:
        if problem.shared_rows and (problem.mask != {"causal"} or problem.queries != problem.keys):
            other = ", ".join(sorted(problem.mask - {"causal"}))
            found = f"a mask with {other}" if other else "queries that see later keys, or keys of a cache"
            return f"under context parallelism PyTorch shares out whole rows under a causal mask alone, not {found}"
        if "alibi" in problem.mask and problem.device != "cpu":
            return f"on {problem.device} it takes no bias more precise than the query, so ALiBi would lose distances"
        return super().refusal(problem)

    def lowering(self, problem: AttentionProblem) -> Lowering | str:
        if problem.device != "cuda" or not takes_wide_values(problem):
            return super().lowering(problem)
        widths = (problem.key_width, problem.value_width)
        return lower_for(
            problem.streams, problem.shares_keys, *widths, "native", stream_heads=problem.stream_heads
        )

    def remark(self, problem: AttentionProblem, lowering: Lowering) -> str | None:
        if problem.device != "cuda":
            return None
        name, passed = kernel_of(problem, lowering)
        why = "; ".join(f"{other}: {reason}" for other, reason in passed)
        dense = f" under a dense mask, {problem.queries} × {problem.keys}" if is_masked(problem) else ""
        maps = ", which writes out every map" if name == "math" else ""
        return f"in PyTorch's {name} kernel{dense}{maps}{f' ({why})' if why else ''}"

    def prepare(self, mask: MaskSpec, problem: AttentionProblem, lowering: Lowering) -> Any:
        queries, keys, device = problem.queries, problem.keys, torch.device(problem.device)
        if mask.is_open(queries, keys):
            return None
        if mask.is_plain_causal(queries, keys):
            return _CAUSAL
        dtype = problem.dtype
        if mask.slopes is not None or (device.type == "cpu" and "bias" in mask.features):
            dtype = torch.float64 if dtype == torch.float64 else torch.float32
        if mask.slopes is not None:
            stacked = replace(mask, slopes=lower_slopes(mask.slopes, lowering, problem.kv_heads))
            diagonals = stacked.diagonals(queries, keys, dtype, device)
            if diagonals is not None:
                return _bands(mask, diagonals, queries, keys)
        return lower_mask(mask.materialise(queries, keys, dtype, device), lowering, problem.kv_heads)

    def __call__(self, call: SoftmaxCall, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
        if not isinstance(mask, tuple):
            return _attend(call.q, call.k, call.v, mask, scale), None
        parts = []
        for band in mask:
            q, k, v = call.q[:, :, band.rows], call.k[:, :, band.keys], call.v[:, :, band.keys]
            parts.append(_attend(q.flip(2), k, v, band.mask, scale).flip(2))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2), None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    causal = isinstance(mask, str)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type == "cuda" and repeats_keys(q.dtype, mask is not None and not causal):
        k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
        grouped = False
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if causal else mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped,
    )
    if out.requires_grad and not torch.compiler.is_compiling():
        _name_what_is_missing(out)
    return out


def _name_what_is_missing(out: Tensor) -> None:
    """Have derivatives of a fused kernel's gradient say who has them; PyTorch's math path has them and stays."""
    node = out.grad_fn
    if (
        node is not None
        and node.name().startswith("ScaledDotProduct")
        and not torch._C._are_functorch_transforms_active()
    ):
        node.register_prehook(_watch_cotangents)
        node.register_hook(_watch_gradients)


def _watch_cotangents(cotangents: Sequence[Tensor | None]) -> None:
    for cotangent in cotangents:
        # Dual numbers reach the backward pass of a forward pass that had none.
        if (
            cotangent is not None
            and forward_ad._current_level >= 0
            and forward_ad.unpack_dual(cotangent).tangent is not None
        ):
            raise RuntimeError(
                "PyTorch's fused attention has no forward-mode derivatives, neither of its output nor of its "
                'gradients: take backend="eager" for jvp, jacfwd and dual numbers'
            )


def _watch_gradients(gradients: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
    for gradient in gradients:
        # Only where the backward pass is itself recorded.
        if gradient is not None and gradient.requires_grad:
            gradient.register_hook(_refuse)


def _refuse(_: Tensor) -> None:
    raise RuntimeError(
        'PyTorch\'s fused attention has no second derivative: take backend="eager" to differentiate twice'
    )


def _bands(mask: MaskSpec, diagonals: Tensor, queries: int, keys: int) -> tuple[Band, ...]:
    """Views of `MaskSpec.diagonals`: [h, i, j] of a band is some [h, i + j], as queries run backwards.

    Forwards it would be [h, j − i], and tensors have no negative strides.
    """
    offset = keys - queries if mask.offset is None else mask.offset
    # Bands are counted in Python, which would tie an exported graph to the length of its example.
    narrows = (mask.is_causal or mask.window is not None) and not torch.compiler.is_exporting()
    at = None if isinstance(offset, Tensor) or not narrows else offset
    rows = queries if at is None else _ROWS
    bands = []
    for first in (0,) if at is None else range(0, queries, rows):
        end = queries if at is None else min(first + rows, queries)
        start, stop = 0, keys
        if at is not None:
            if mask.window is not None:
                start, stop = first + at - mask.window + 1, end + at + mask.window - 1
            if mask.is_causal:
                stop = end + at
            # At least one key, hidden or not: rows that see none are zeros, which takes a softmax to say.
            start = min(max(start, 0), keys - 1)
            stop = max(min(stop, keys), start + 1)
        part = diagonals[:, queries - end + start :]
        heads, stride = part.shape[0], part.stride(0)
        shape = (1, heads, end - first, stop - start)
        bands.append(
            Band(
                slice(first, end),
                slice(start, stop),
                part.as_strided(shape, (heads * stride, stride, 1, 1)),
            )
        )
    return tuple(bands)
