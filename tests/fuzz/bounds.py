"""How far an answer may be from the exact one: what rounding may do, worked out from the numbers of the problem.

Every quantity on the way is followed by a bound of its error, element by element, in float64. With ε of the dtype the
answer is computed in, ε_l of the logits' (float32's for a fused kernel, which holds them in registers) and R roundings:

    logits     e_l = R ε_l (|scale| |q| |k|ᵀ + |bias|)
    weights    P̃ = min(1, P exp(e)),   e = e_l + e_n, e_n of the sum they are divided by
               e_P = max(P̃ − P, P − P exp(−e)) + R ε P̃
    output     e_O = (e_P,1 + |λ| e_P,2) |V| + R ε (P̃_1 + |λ| P̃_2) |V|
    weights'   G = |dO| |V|ᵀ + |dO| · Σ P̃ |V|,   the two terms of a softmax's gradient
    logits'    e_S = |λ_s| (e_P G + P̃ (R ε G + |dO| · e_O))
    dQ, dK     |scale| e_S |K| and its like, plus R ε of the sum's absolute terms
    dV, dλ     (e_P,1 + |λ| e_P,2)ᵀ |dO| + R ε ..., |dO| · e_O,2

R grows with the square root of the longest sum: products of n terms are summed in chains.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fuzz.exact import streams_of

CHAIN = 16


@dataclass(frozen=True)
class Rounding:
    """ε of numbers, ε of logits, and the smallest number that counts."""

    number: float
    logit: float
    tiny: float


def rounding_of(dtype: torch.dtype, fused: bool) -> Rounding:
    """Of an answer in `dtype` from a fused kernel or from anything else."""
    limits = torch.finfo(dtype)
    logit = torch.finfo(torch.float32).eps if fused else limits.eps
    # Kernels keep statistics in float32, whose subnormal numbers some processors drop.
    return Rounding(limits.eps, logit, max(limits.smallest_normal, 1e-300))


def roundings(terms: int) -> float:
    """R for sums of `terms` terms."""
    return 4 + 2 * math.sqrt(terms / CHAIN)


def bounds(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | float | None,
    see: Tensor,
    bias: Tensor | None,
    scale: float,
    cotangent: Tensor,
    rounding: Rounding,
) -> list[Tensor]:
    """Of the output, then of the gradients of q, k, v and, where λ is a tensor, of λ. Arguments as for `attend`."""
    streams, groups = 1 if lam is None else 2, v.shape[1]
    queries, keys = streams_of(q, k, groups, streams)
    heads = queries[0].shape[1]
    repeats = heads // groups
    values, grad, size = v.abs().repeat_interleave(repeats, 1), cotangent.abs(), abs(scale)
    gate = torch.zeros(1, dtype=q.dtype) if lam is None else torch.as_tensor(lam, dtype=q.dtype).abs()
    r = roundings(max(q.shape[3], v.shape[3], k.shape[2], repeats * q.shape[2])) * rounding.number
    r_logit = roundings(q.shape[3]) * rounding.logit
    above, weights = [], []
    for query, key in zip(queries, keys, strict=True):
        logits, magnitude = scale * (query @ key.mT), size * (query.abs() @ key.abs().mT)
        if bias is not None:
            logits, magnitude = logits + bias, magnitude + bias.abs()
        largest, error = _weights(logits, r_logit * magnitude, see)
        weights.append(largest)
        above.append(error + r * largest + rounding.tiny * see)
    factors = [torch.ones(1, dtype=q.dtype), gate][:streams]
    outputs = [w @ values for w in weights]
    errors = [e @ values + r * o for e, o in zip(above, outputs, strict=True)]
    output = sum(f * (e + r * o) for f, e, o in zip(factors, errors, outputs, strict=True))
    deltas = [(grad * o).sum(-1, keepdim=True) for o in outputs]
    mixed = (grad * sum(f * e for f, e in zip(factors, errors, strict=True))).sum(-1, keepdim=True)
    total = sum(f * d for f, d in zip(factors, deltas, strict=True))
    towards = grad @ values.mT
    steps, slips = [], []
    for f, w, e in zip(factors, weights, above, strict=True):
        g = towards + total
        steps.append(f * w * g)
        slips.append(f * (e * g + w * (r * g + mixed)))
    dq, dk = [], []
    for step, slip, query, key in zip(steps, slips, queries, keys, strict=True):
        dq.append(size * (slip + r * step) @ key.abs())
        dk.append(_grouped(size * (slip + r * step).mT @ query.abs(), groups))
    own = k.shape[1] == streams * groups
    slope = sum(f * (e + r * w) for f, e, w in zip(factors, above, weights, strict=True))
    found = [output, torch.stack(dq, 2).flatten(1, 2)]
    found.append(torch.stack(dk, 2).flatten(1, 2) if own else sum(dk))
    found.append(_grouped(slope.mT @ grad, groups))
    if isinstance(lam, Tensor):
        unit = (grad * (errors[1] + r * outputs[1])).sum(-1, keepdim=True)
        found.append(unit.sum_to_size(lam.shape) if lam.ndim else unit.sum())
    return [x + rounding.tiny for x in found]


def _weights(logits: Tensor, error: Tensor, see: Tensor) -> tuple[Tensor, Tensor]:
    """The largest weights that may be computed when every logit is off by up to its error, and how far off they are."""
    hidden = ~see
    logs = logits.masked_fill(hidden, -math.inf).log_softmax(-1).nan_to_num(nan=-math.inf)
    more, less = (torch.logsumexp(logs + sign * error, -1, keepdim=True) for sign in (1, -1))
    off = error + torch.maximum(more, -less).nan_to_num(nan=0.0, posinf=math.inf)
    exact = logs.exp().masked_fill(hidden, 0.0)
    largest = (logs + off).clamp(max=0.0).exp().masked_fill(hidden, 0.0)
    return largest, torch.maximum(largest - exact, exact * -torch.expm1(-off))


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).sum(2)
