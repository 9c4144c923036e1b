"""From placed heads to one mixed output: lower, run, raise, mix.

Legend: B batch, H query heads, G key-value heads, L queries, S keys, D key width, E value width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from clearhead.core.dispatch import AttentionProblem, Backend, Engine, Kernel, Plan, choose
from clearhead.core.hidden import (
    all_finite,
    hides_real_keys,
    isolated,
    readable,
    spoilt_sequences,
    without,
)
from clearhead.core.lowering import lower, unlower_maps, unlower_streams
from clearhead.core.masks import MaskSpec
from clearhead.core.norm import HeadNorm
from clearhead.core.streams import Streams, repeat_kv

Mix = Callable[[tuple[Tensor, ...], Tensor | None], Tensor]
# What a fused kernel may know a mix by; "other" is any that none of them knows.
Mixing = Literal["single", "difference", "other"]


def single(streams: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
    """The only stream."""
    (output,) = streams
    return output


def difference(streams: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
    """o1 − gate · o2. Linear in the streams, so the same function mixes outputs and attention maps.

    A second stream with fewer heads than the first serves several heads each: head h takes away head h // (H1 // H2).
    Taken in float32 at least: the difference of two near-equal maps is what bfloat16 loses first.
    """
    assert gate is not None
    signal, noise = streams
    noise = repeat_kv(noise, signal.shape[1])
    precision = torch.float64 if signal.dtype == torch.float64 else torch.float32
    return (signal - gate.to(precision) * noise).to(signal.dtype)


MIXES: dict[Mixing, Mix] = {"single": single, "difference": difference}


def problem_of(heads: Streams, mask: MaskSpec, mixing: Mixing, needs_maps: bool = False) -> AttentionProblem:
    """What the choice of a backend needs to know of these tensors, mixed as `mixing` says."""
    q, k, v = heads.q[0], heads.k[0], heads.v
    gates = [x for x in (heads.gate, heads.gate_logit) if x is not None]
    tensors = (*heads.q, *heads.k, v, *gates)
    return AttentionProblem.of(
        [stream.shape[1] for stream in heads.q],
        k.shape[1],
        len(heads.k),
        q.shape[3],
        v.shape[3],
        queries=q.shape[2],
        keys=heads.keys,
        mask=mask,
        mixing=mixing,
        dtype=q.dtype,
        device=q.device,
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        needs_maps=needs_maps,
        held_bits=None if heads.held is None else heads.held.bits,
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan and the mask in its backend's own form: what all layers of one forward pass share.

    real:   (B or 1, S) bool, False at keys that are padding and must not be looked at; None where none is.
    hidden: the mask as it came, where it hides real keys from a query and the engine might not keep them apart.
    looks:  whether values may be looked at to see if any of this matters.
    """

    plan: Plan
    mask: Any
    real: Tensor | None = None
    hidden: MaskSpec | None = None
    looks: bool = False

    def norms(self, norm: HeadNorm | None, heads: Streams) -> bool:
        """Whether `attend` of these streams would norm its output itself, if they say `norm`."""
        backend = self.plan.backend
        if norm is None or not isinstance(backend, Kernel) or heads.v.shape[0] == 0:
            return False
        return backend.norms(norm, heads)


def prepare(
    backends: tuple[Backend, ...], problem: AttentionProblem, mask: MaskSpec, automatic: bool
) -> Prepared:
    """Choose among `backends` and turn `mask` into what the chosen one takes."""
    chosen = choose(backends, problem, automatic)
    if not isinstance(chosen.backend, Engine):
        return Prepared(chosen, mask)
    assert chosen.lowering is not None
    if mask.is_of_nothing:
        # `attend` answers an empty batch without its engine.
        return Prepared(chosen, mask)
    native = chosen.backend.prepare(mask, problem, chosen.lowering)
    looks = problem.device == "cpu" and not problem.modes
    hidden = mask if looks and hides_real_keys(mask, problem.queries, problem.keys) else None
    return Prepared(chosen, native, mask.key_padding, hidden, looks)


def attend(
    heads: Streams,
    prepared: Prepared,
    scale: float,
    mix: Mix,
    with_maps: bool = False,
    layer_idx: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """The mixed output (B, H, L, E) and, if asked, the effective map (B, H, L, S), A1 − gate·A2 for a difference.

    softmax(scale · q kᵀ + mask) v for every stream, then `mix`. Rows that see no key give zeros. With maps the output
    is theirs times v, so that a gradient with respect to them is one of the output. layer_idx is for engines
    that look at the layer's place.
    """
    backend = prepared.plan.backend
    if heads.v.shape[0] == 0 or not backend.takes_logits:
        heads = heads.closed()
    if heads.v.shape[0] == 0:
        past = 0 if heads.held is None else heads.held.tokens
        return _of_nothing(heads.piece(past, heads.k, heads.v).expanded(), mix, with_maps)
    if isinstance(backend, Kernel):
        return backend.run(heads if backend.takes_tables else heads.expanded(), prepared.mask, scale), None
    heads, scale = _legal(heads.expanded(), scale)
    if prepared.real is None and prepared.hidden is None:
        return _run(heads, prepared, scale, mix, with_maps, layer_idx)
    known = prepared.looks and readable(heads.v)
    if known and all_finite(heads):
        return _run(heads, prepared, scale, mix, with_maps, layer_idx)
    if prepared.real is not None:
        heads = without(heads, ~prepared.real[:, None, :, None])
    if not known or prepared.hidden is None:
        return _run(heads, prepared, scale, mix, with_maps, layer_idx)
    spoilt = spoilt_sequences(heads)
    output, effective = _run(without(heads, spoilt), prepared, scale, mix, with_maps, layer_idx)
    outputs, maps = zip(*isolated(heads, prepared.hidden, scale), strict=True)
    output = torch.where(spoilt, mix(outputs, heads.gate), output)
    return output, None if effective is None else torch.where(spoilt, mix(maps, heads.gate), effective)


def _run(
    heads: Streams, prepared: Prepared, scale: float, mix: Mix, with_maps: bool, layer_idx: int
) -> tuple[Tensor, Tensor | None]:
    backend, lowering = prepared.plan.backend, prepared.plan.lowering
    assert isinstance(backend, Engine) and lowering is not None
    results = [backend(call, prepared.mask, scale) for call in lower(heads, lowering, layer_idx)]
    groups = heads.v.shape[1]
    streams = unlower_streams([out for out, _ in results], lowering, groups)
    if not with_maps:
        return mix(streams, heads.gate), None
    effective = mix(unlower_maps([m for _, m in results if m is not None], lowering, groups), heads.gate)
    if mix is single:
        return mix(streams, heads.gate), effective
    # Through the map that is returned, so that it has a gradient; the same by linearity.
    return effective @ repeat_kv(heads.v, effective.shape[1]), effective


def _legal(heads: Streams, scale: float) -> tuple[Streams, float]:
    """The same logits with a scale above zero: PyTorch's fused kernels are wrong, or NaN, for any other."""
    if scale > 0:
        return heads, scale
    if scale < 0:
        return replace(heads, q=tuple(-q for q in heads.q)), -scale
    return replace(heads, q=tuple(q * 0.0 for q in heads.q)), 1.0


def _of_nothing(heads: Streams, mix: Mix, with_maps: bool) -> tuple[Tensor, Tensor | None]:
    """An empty batch: output and map of the right shapes, and gradients that are empty too."""
    maps = tuple(q @ repeat_kv(k, q.shape[1]).mT for q, k in zip(heads.q, heads.own_keys, strict=True))
    outputs = tuple(m @ repeat_kv(heads.v, m.shape[1]) for m in maps)
    return mix(outputs, heads.gate), mix(maps, heads.gate) if with_maps else None
