"""Attention written out, its logits, keys and values rounded to what few bits could hold: `probing.rounding`."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clearhead.core.dispatch import AttentionProblem, Backend, register_factory
from clearhead.core.lowering import Lowering, SoftmaxCall
from clearhead.core.streams import repeat_kv
from clearhead.engines.eager import Eager

OWN = "clearhead_quantised_streams"
"""The engine for the models of this library."""


@dataclass(frozen=True)
class Scheme:
    """Bits of each part, None where nothing is rounded.

    per: what shares a step of the logits: the whole "tensor" of one layer, stream and text, as in the Differential
        Transformer paper, or each "head" of it.
    group: inputs of a linear layer that share a step; None: all of an output channel.
    """

    logits: int | None = None
    weights: int | None = None
    cache: int | None = None
    per: Literal["tensor", "head"] = "tensor"
    group: int | None = None


@dataclass
class Active:
    """A scheme in use, and how many attentions were computed under it."""

    scheme: Scheme
    calls: int = 0


ACTIVE: ContextVar[Active] = ContextVar("clearhead_quantised")


def absmax(x: Tensor, bits: int, dim: tuple[int, ...], visible: Tensor | None = None) -> Tensor:
    """x rounded to `bits` bits, one step for all values along `dim`; the same shape and dtype.

    visible: which values the step is made from; the others are of no use afterwards. Computed in float32 at least.
    Raises ValueError unless bits is 2 to 16.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be 2 to 16, not {bits}")
    wide = x if x.dtype == torch.float64 else x.float()
    most = 2 ** (bits - 1) - 1
    sizes = wide.abs() if visible is None else wide.abs().masked_fill(~visible, 0.0)
    # Where everything is 0 there is no step, and 0 stays 0.
    step = (sizes.amax(dim, keepdim=True) / most).clamp(min=torch.finfo(wide.dtype).tiny)
    return ((wide / step).round().clamp(-most, most) * step).to(x.dtype)


def rounded_logits(logits: Tensor, visible: Tensor | None, scheme: Scheme) -> Tensor:
    """(B, H, L, S) scaled logits as the scheme has them; one step a text of the batch, so no neighbour changes it."""
    if scheme.logits is None:
        return logits
    return absmax(logits, scheme.logits, (1, 2, 3) if scheme.per == "tensor" else (2, 3), visible)


def rounded_cache(x: Tensor, scheme: Scheme) -> Tensor:
    """(B, G, S, D) keys or values as the scheme has them."""
    return x if scheme.cache is None else absmax(x, scheme.cache, (-1,))


class QuantisedEager(Eager):
    """Attention written out, its logits, keys and values rounded by the scheme that is set; one call a stream."""

    name = OWN

    def lowering(self, problem: AttentionProblem) -> Lowering | str:
        if problem.streams == 1:
            return Lowering("direct", 1, shares_keys=True)
        # Streams that share keys would otherwise be heads of one call and share a step.
        return Lowering("FlashDiffAttn_1", problem.streams)

    def __call__(self, call: SoftmaxCall, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
        visible = bias = None
        if mask is not None:
            visible = mask if mask.dtype == torch.bool else mask != float("-inf")
            bias = None if mask.dtype == torch.bool else mask
        return _attention(call.q, call.k, call.v, scale, visible, bias)


def quantised_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """For Hugging Face's attention interface, whose `options` they are."""
    for name, what in (("softcap", "caps its logits"), ("s_aux", "has attention sinks")):
        if options.get(name) is not None:
            raise ValueError(f"the attention of this model {what} ({name}), which is not emulated here")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = bias = None
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        visible = attention_mask
    elif attention_mask is not None:
        visible, bias = attention_mask > torch.finfo(attention_mask.dtype).min / 2, attention_mask
    out, maps = _attention(query, key, value, scale, visible, bias)
    return out.transpose(1, 2).contiguous(), maps


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(round(scale · q kᵀ) + bias) v over what is visible: (B, H, L, E) and its maps (B, H, L, S)."""
    active, heads = ACTIVE.get(), q.shape[1]
    active.calls += 1
    scheme = active.scheme
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (repeat_kv(rounded_cache(x, scheme), heads) for x in (k, v))
    logits = rounded_logits((q @ k.transpose(-1, -2)).to(wide) * scale, visible, scheme)
    if bias is not None:
        logits = logits + bias
    if visible is not None:
        logits = logits.masked_fill(~visible, torch.finfo(wide).min)
    maps = logits.softmax(dim=-1).to(v.dtype)
    return maps @ v, maps


def _backend(name: str) -> Backend | None:
    return QuantisedEager() if name == OWN else None


register_factory(_backend)
