"""Problems for the CPU kernel, in every form it takes, and what rounding alone may do to their answers.

Letters: B batch, H query heads of one stream, G key-value heads, L queries, S keys, D key width, E value width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.functional import attention, differential_attention
from clearhead.kernels.cpu import library
from tests.kernels import plain
from tests.oracles import differential, softmax
from tests.oracles.softmax import visible

SETS = ("avx512_bf16", "avx512", "avx2", "portable")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def instruction_sets() -> tuple[str, ...]:
    """Those that were built and that this processor has; all names where there is no kernel, to skip each."""
    if library.missing() is not None:
        return SETS
    loaded = library.load()
    best, found = loaded.isa(), []
    for name in SETS:
        try:
            loaded.set_isa(name)
        except ValueError:
            continue
        found.append(name)
    loaded.set_isa(best)
    return tuple(found)


# The uppermost decorator varies fastest: there, what is solved once serves every set.
every_set = pytest.mark.parametrize("isa", instruction_sets(), indirect=True)


@dataclass(frozen=True)
class Case:
    """One problem.

    lam:    a number, or "call", "head" or "token", how far a random λ (negative and above one among them) reaches.
    hidden: of "padding" (a third at the left of the first row, and scattered tokens), "shared padding" (one row for the
        batch), "left padding" (without the scattered ones), "documents", "shared documents" and "shared
        runs" (three documents one behind the other).
    layout: how q, k, v and the cotangent lie in memory, a key of LAYOUTS.
    spread: how far the queries spread, and so the logits.
    """

    streams: int = 2
    own_keys: bool = False
    batch: int = 2
    heads: int = 4
    groups: int = 2
    queries: int = 20
    keys: int = 20
    width: int = 16
    value_width: int = 16
    lam: float | str = "token"
    causal: bool = False
    window: int | None = None
    hidden: tuple[str, ...] = ()
    scale: float | None = None
    layout: str = "dense"
    spread: float = 1.0


@dataclass(frozen=True)
class Masks:
    """The masks of a case as arguments of the public op, and as (B, 1, L, S) for the oracle."""

    arguments: dict[str, Any]
    allowed: Tensor


@dataclass(frozen=True)
class Inputs:
    """q, k, v and perhaps λ in float64, rounded to the dtype they will be used in; and the output's gradient."""

    tensors: tuple[Tensor, ...]
    cotangent: Tensor


@lru_cache(8)
def make_masks(case: Case) -> Masks:
    rng = torch.Generator().manual_seed(case.queries + 1000 * case.keys)
    rows = {name: 1 if name.startswith("shared") else case.batch for name in case.hidden}
    arguments: dict[str, Any] = {"is_causal": case.causal, "window": case.window}
    parts: dict[str, Any] = {}
    for name in case.hidden:
        size = (rows[name], case.keys)
        if name.endswith("padding"):
            real = torch.rand(size, generator=rng) < (1.0 if name == "left padding" else 0.8)
            real[0, : case.keys // 3] = False
            arguments["key_padding_mask"], parts["key_padding"] = real, real.expand(case.batch, -1)
        else:
            # Runs and scattered tokens; the numbers are far apart, negative, and in no order.
            numbers = torch.tensor([3, -(2**40), 7, 2**40, -1])
            which = torch.where(
                torch.rand(size, generator=rng) < (1.0 if name == "shared runs" else 0.8),
                torch.arange(case.keys) * 3 // case.keys,
                torch.randint(0, 5, size, generator=rng),
            )
            arguments["documents"] = numbers[which]
            every = numbers[which].expand(case.batch, -1)
            parts |= {"documents": every[:, case.keys - case.queries :], "key_documents": every}
    sizes = (case.batch, case.queries, case.keys)
    seen = visible(*sizes, causal=case.causal, window=case.window, **parts)
    return Masks(arguments, seen[:, None])


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    rng = torch.Generator().manual_seed(case.width + 100 * case.value_width + 10_000 * case.queries)

    def rand(*shape: int) -> Tensor:
        if case.layout == "expanded":
            shape = (1, *shape[1:])
        x = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).double()
        return x.expand(case.batch, *shape[1:])

    key_heads = 2 * case.groups if case.own_keys else case.groups
    q = rand(case.batch, case.streams * case.heads, case.queries, case.width) * case.spread
    k = rand(case.batch, key_heads, case.keys, case.width)
    v = rand(case.batch, case.groups, case.keys, case.value_width)
    tensors = [q.to(dtype).double(), k, v]
    if case.streams == 2 and isinstance(case.lam, str):
        shape = {"call": (), "head": (case.heads, 1, 1), "token": (case.batch, case.heads, case.queries, 1)}
        lam = torch.randn(shape[case.lam], generator=rng, dtype=torch.float64)
        tensors.append((0.5 + lam).float().double())
    cotangent = torch.randn(
        case.batch, case.heads, case.queries, case.value_width, generator=rng, dtype=torch.float64
    )
    return Inputs(tuple(tensors), cotangent.to(dtype).double())


# Where (B, H, N, D) may lie in memory: a dense tensor of the same numbers and the view of it that has that shape.
LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]] = {
    "dense": lambda x: (x, lambda y: y),
    "model": lambda x: (x.transpose(1, 2), lambda y: y.transpose(1, 2)),
    "tokens first": lambda x: (x.permute(2, 0, 1, 3), lambda y: y.permute(1, 2, 0, 3)),
    "width outside": lambda x: (x.transpose(2, 3), lambda y: y.transpose(2, 3)),
    "slice": lambda x: (
        torch.nn.functional.pad(x, (3, 2, 1, 4)),
        lambda y: y[:, :, 1:-4, 3:-2],
    ),
    "every other head": lambda x: (x.repeat_interleave(2, 1), lambda y: y[:, 1::2]),
    "expanded": lambda x: (x[:1], lambda y: y.expand(2, -1, -1, -1)),
}


def answers(
    function: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype, layout: str, grad: bool = True
) -> list[Tensor]:
    """The output and the gradients of q, k, v and λ, in float64; q, k, v and the cotangent laid out as told.

    Without `grad` the output alone, computed as it is where no gradient will follow.
    """
    views = []
    for x in inputs.tensors[:3]:
        dense, view = LAYOUTS[layout](x.to(dtype))
        views.append(view(dense.clone(memory_format=torch.contiguous_format).requires_grad_()))
    if len(inputs.tensors) == 4:
        lam = inputs.tensors[3].to(torch.promote_types(dtype, torch.float32))
        views.append(lam.clone().requires_grad_())
    with torch.set_grad_enabled(grad):
        out = function(*views)
    assert out.dtype == dtype
    if not grad:
        return [out.double()]
    dense, view = LAYOUTS["dense" if layout == "expanded" else layout](inputs.cotangent.to(dtype))
    gradients = torch.autograd.grad(out, views, view(dense.contiguous()), materialize_grads=True)
    return [x.detach().double() for x in (out, *gradients)]


def op_of(case: Case, backend: str, **more: Any) -> Callable[..., Tensor]:
    arguments = {**make_masks(case).arguments, "scale": case.scale, "backend": backend, **more}
    if case.streams == 1:
        return lambda q, k, v: attention(q, k, v, **arguments)
    return lambda q, k, v, lam=case.lam: differential_attention(q, k, v, lam, **arguments)


def oracle_of(case: Case) -> Callable[..., Tensor]:
    arguments: dict[str, Any] = {"allowed": make_masks(case).allowed, "scale": case.scale}
    if case.streams == 1:
        return lambda q, k, v: softmax.attention(q, k, v, **arguments)
    return lambda q, k, v, lam=case.lam: differential.differential_attention(q, k, v, lam, **arguments)


def plain_of(case: Case) -> Callable[..., Tensor]:
    arguments: dict[str, Any] = {"allowed": make_masks(case).allowed, "scale": case.scale}
    if case.streams == 1:
        return lambda q, k, v: plain.attention(q, k, v, **arguments)
    return lambda q, k, v, lam=case.lam: plain.attention(q, k, v, lam, **arguments)


def rounding(case: Case, inputs: Inputs, dtype: torch.dtype, allowed: Tensor | None = None) -> list[Tensor]:
    """What one rounding of every number on the way may do to the output and to each gradient, element by element.

    Each is the formula of the value with absolute values everywhere, in float64, times ε of `dtype`: a sum whose terms
    cancel may be off by ε of its terms, one whose terms agree by ε of itself, and one without terms not at all.

        a = |scale| |q| |k|ᵀ              κ = 1 + 2 ε32/ε · max a of the row: exp makes a logit's error a relative one,
                                          of the weight and of the sum that it is divided by
        W_s = κ (P_s + smallest normal / ε) where visible, for what underflows; the result may underflow, too
        |O_s| = W_s |V|                   |O| = |O_1| + |λ| |O_2|
        |dV| = (W_1 + |λ| W_2)ᵀ |dO|      |dλ| = |dO| · |O_2|
        |δ_1| = |dO| · (|O| + |λ| |O_2|)   |δ_2| = |dO| · |O_2|
        |dS_s| = W_s (|dO| |V|ᵀ + |δ_s|), times |λ| for s = 2
        |dQ_s| = |scale| |dS_s| |K|       |dK_s| = |scale| |dS_s|ᵀ |Q_s|
    """
    epsilon, single = torch.finfo(dtype).eps, torch.finfo(torch.float32)
    q, k, v, *rest = (x.abs() for x in inputs.tensors)
    grad, seen = inputs.cotangent.abs(), make_masks(case).allowed if allowed is None else allowed
    scale = abs(case.width**-0.5 if case.scale is None else case.scale)
    repeats, streams = case.heads // case.groups, case.streams

    def per_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(repeats, 1)

    def per_group(x: Tensor) -> Tensor:
        return x.unflatten(1, (case.groups, repeats)).sum(2)

    signed_q, signed_k = inputs.tensors[0], inputs.tensors[1]
    weights, queries, keys = [], [], []
    for s in range(streams):
        own = slice(s, None, 2) if case.own_keys else slice(None)
        queries.append(q[:, s::streams])
        keys.append(per_head(k[:, own]))
        factor = scale if case.scale is None else case.scale
        logits = factor * signed_q[:, s::streams] @ per_head(signed_k[:, own]).mT
        p = logits.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
        a = (scale * queries[s] @ keys[s].mT * seen).amax(-1, keepdim=True)
        weights.append((1 + 2 * single.eps / epsilon * a) * (p + single.tiny / epsilon) * seen)

    values = per_head(v)
    outputs = [w @ values for w in weights]
    grad_weights = grad @ values.mT
    deltas = [(grad * o).sum(-1, keepdim=True) for o in outputs]
    if streams == 1:
        mixed, mixed_weights, factors = outputs[0], weights[0], [1.0]
    else:
        gate = rest[0] if rest else torch.tensor(abs(float(case.lam)), dtype=torch.float64)
        mixed, mixed_weights = outputs[0] + gate * outputs[1], weights[0] + gate * weights[1]
        gate_unit = deltas[1]
        deltas[0] = deltas[0] + 2 * gate * deltas[1]
        factors = [1.0, gate]
    steps = [f * w * (grad_weights + d) * scale for f, w, d in zip(factors, weights, deltas, strict=True)]
    dq = torch.stack([s @ key for s, key in zip(steps, keys, strict=True)], 2).flatten(1, 2)
    dk = [per_group(s.mT @ query) for s, query in zip(steps, queries, strict=True)]
    parts = [mixed, dq, torch.stack(dk, 2).flatten(1, 2) if case.own_keys else sum(dk)]
    parts.append(per_group(mixed_weights.mT @ grad))
    if rest:
        parts.append(gate_unit.sum_to_size(rest[0].shape) if rest[0].ndim else gate_unit.sum())
    return [epsilon * x + single.tiny * (x > 0) for x in parts]


@dataclass(frozen=True)
class Solution:
    """A case in one dtype: its inputs, the oracle's answers, `rounding`, and the answers of plain arithmetic."""

    inputs: Inputs
    expected: list[Tensor]
    units: list[Tensor]
    plain: list[Tensor]


@lru_cache(8)
def solve(case: Case, dtype: torch.dtype) -> Solution:
    inputs = make_inputs(case, dtype)
    return Solution(
        inputs,
        answers(oracle_of(case), inputs, torch.float64, "dense"),
        rounding(case, inputs, dtype),
        answers(plain_of(case), inputs, dtype, "dense"),
    )


NAMES = ("output", "gradient of q", "gradient of k", "gradient of v", "gradient of λ")
ROUNDINGS = 2
# Every instruction set stays below 0.81 of what this allows; sums in one chain of 256 or 512 reach 1.2 of it.
WORSE = 1.5
HANDFUL = 32


def assert_rounding_only(
    found: Sequence[Tensor], expected: Sequence[Tensor], units: Sequence[Tensor]
) -> None:
    """Every element within ROUNDINGS of what one rounding may do to it; NaN is infinitely far."""
    for name, a, b, unit in zip(NAMES, found, expected, units, strict=False):
        assert a.shape == b.shape == unit.shape
        error = (a - b).abs().nan_to_num(nan=float("inf"))
        worst = float((error / unit).nan_to_num(nan=0.0).max())
        assert worst <= ROUNDINGS, f"the {name} is {worst:.2g} roundings off"


def assert_right(found: Sequence[Tensor], solution: Solution, dtype: torch.dtype) -> None:
    """`assert_rounding_only`, and each tensor as a whole at most WORSE times as far off as plain arithmetic's.

    That is `plain.py`'s, give or take ε of the tensor. Not asked of a handful of numbers, which luck may get right.
    Nothing here depends on the processor's libraries, so a bound that holds on one holds on all.
    """
    assert len(found) in (1, len(solution.expected))
    assert_rounding_only(found, solution.expected, solution.units)
    for name, a, b, simple in zip(NAMES, found, solution.expected, solution.plain, strict=False):
        error, own = float((a - b).norm()), float((simple - b).norm())
        allowed = WORSE * (own + torch.finfo(dtype).eps * float(b.norm()))
        assert error <= allowed or b.numel() < HANDFUL, (
            f"the {name} is {error:.2e} off, over {allowed:.2e}; plain arithmetic is {own:.2e} off"
        )
