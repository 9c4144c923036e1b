"""From placed heads to one mixed output: lower, run, raise, mix.

Legend: B batch, H query heads, G key-value heads, L queries, S keys, D key width, E value width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clearhead.core.dispatch import Backend, Kernel, Plan, Problem, choose
from clearhead.core.heads import Heads, repeat_kv
from clearhead.core.legalise import lower, raise_maps, raise_streams
from clearhead.core.masks import MaskSpec

Mix = Callable[[tuple[Tensor, ...], Tensor | None], Tensor]


def single(streams: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
    """The only stream."""
    (output,) = streams
    return output


def difference(streams: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
    """o1 − gate · o2. Linear in the streams, so the same function mixes outputs and attention maps.

    Taken in float32 at least: the difference of two near-equal maps is what bfloat16 loses first.
    """
    assert gate is not None
    signal, noise = streams
    precision = torch.float64 if signal.dtype == torch.float64 else torch.float32
    return (signal - gate.to(precision) * noise).to(signal.dtype)


def mixing_of(mix: Mix) -> str:
    """The name of `mix` as a fused kernel may know it."""
    if mix is single:
        return "single"
    return "difference" if mix is difference else "other"


def problem_of(heads: Heads, mask: MaskSpec, mix: Mix, needs_maps: bool = False) -> Problem:
    """What the choice of a backend needs to know of these tensors."""
    q, k = heads.q[0], heads.k[0]
    tensors = (
        (*heads.q, *heads.k, heads.v) if heads.gate is None else (*heads.q, *heads.k, heads.v, heads.gate)
    )
    return Problem(
        streams=len(heads.q),
        shares_keys=heads.shares_keys,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        queries=q.shape[2],
        keys=k.shape[2],
        key_width=q.shape[3],
        value_width=heads.v.shape[3],
        dtype=q.dtype,
        device=q.device.type,
        mask=mask.features,
        ends_aligned=mask.ends_aligned(q.shape[2], k.shape[2]),
        mixing=mixing_of(mix),
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        needs_maps=needs_maps,
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan and the mask in its backend's own form: what all layers of one forward pass share."""

    plan: Plan
    mask: Any


def prepare(backends: tuple[Backend, ...], problem: Problem, mask: MaskSpec, automatic: bool) -> Prepared:
    """Choose among `backends` and turn `mask` into what the chosen one takes."""
    chosen = choose(backends, problem, automatic)
    if isinstance(chosen.backend, Kernel) or chosen.lowering is None:
        return Prepared(chosen, mask)
    return Prepared(chosen, chosen.backend.prepare(mask, problem, chosen.lowering))


def attend(
    heads: Heads, prepared: Prepared, scale: float, mix: Mix, with_maps: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The mixed output (B, H, L, E) and, if asked, the effective map (B, H, L, S), A1 − gate·A2 for a difference.

    softmax(scale · q kᵀ + mask) v for every stream, then `mix`. Rows that see no key give zeros.
    """
    backend, lowering = prepared.plan.backend, prepared.plan.lowering
    if isinstance(backend, Kernel) or lowering is None:
        assert isinstance(backend, Kernel)
        return backend.run(heads if backend.takes_tables else heads.expanded(), prepared.mask, scale), None
    heads = heads.expanded()
    results = [backend(call, prepared.mask, scale) for call in lower(heads, lowering)]
    groups = heads.v.shape[1]
    streams = raise_streams([out for out, _ in results], lowering, groups)
    if not with_maps:
        return mix(streams, heads.gate), None
    effective = mix(raise_maps([m for _, m in results if m is not None], lowering, groups), heads.gate)
    if mix is single:
        return mix(streams, heads.gate), effective
    # Through the map that is returned, so that it has a gradient; the same by linearity.
    return effective @ repeat_kv(heads.v, effective.shape[1]), effective
