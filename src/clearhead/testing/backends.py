"""Contract of engines and kernels: right where they run, refused with a reason where they do not.

Legend: B batch, H query heads, G key-value heads, L queries, S keys, D key width.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from clearhead.core.attend import Mixing, attend, difference, prepare, problem_of, single
from clearhead.core.dispatch import Backend, Engine, Kernel
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from clearhead.testing.masks import MASKS, cast, make_mask, rand
from clearhead.testing.oracles import differential, softmax

B, L, D = 2, 5, 8
# Query heads of the output and key-value heads.
LAYOUTS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (2, 1)}
# Streams, whether each has keys of its own, and how many times as wide as keys the values are.
FORMS = {"softmax": (1, True, 1), "v1": (2, True, 2), "v2": (2, False, 1), "own width": (2, True, 1)}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
NAMES = ("output", "gradient of q", "gradient of k", "gradient of v", "gradient of λ")


@dataclass
class Checked:
    """What a check looked at: cases that ran and were right, and how often each reason was given for the others."""

    ran: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


def check_engine(engine: Engine, *, masks: Iterable[str] = MASKS, device: str = "cpu") -> Checked:
    """Compare `engine` with the float64 oracles: every head layout, mask and dtype, values, gradients and maps.

    A case that it refuses is counted with its reason. Raises AssertionError, naming the case, for a wrong number, an
    empty reason, maps that its caps promise and it does not return, or if it runs no case at all.
    """
    checked = _check(engine, masks, device)
    if engine.caps(device).maps:
        _check_maps(engine, device)
    return checked


def check_kernel(kernel: Kernel, *, masks: Iterable[str] = MASKS, device: str = "cpu") -> Checked:
    """The same for a kernel, which has no maps: where it does not refuse it is right, λ's gradient included."""
    return _check(kernel, masks, device)


def _check(backend: Backend, masks: Iterable[str], device: str) -> Checked:
    checked = Checked()
    for kind in masks:
        for form in FORMS:
            for layout in LAYOUTS:
                for dtype in DTYPES:
                    _check_case(backend, (form, layout, kind), dtype, device, checked)
    assert checked.ran, f"{backend.name} ran none of the cases; it says: {', '.join(checked.refused)}"
    return checked


Case = tuple[str, str, str]


def _check_case(backend: Backend, case: Case, dtype: torch.dtype, device: str, checked: Checked) -> None:
    form, layout, kind = case
    name = f"{backend.name}: {form}, {layout}, mask {kind!r}, {str(dtype).removeprefix('torch.')}"
    mask = make_mask(kind, B, LAYOUTS[layout][0], L)
    inputs = [x.to(device, dtype) for x in problem(form, layout, mask.keys_beyond_queries)]
    heads, mix = heads_of(inputs), single if len(inputs) == 3 else difference
    mixing: Mixing = "single" if len(inputs) == 3 else "difference"
    spec = spec_of({key: _moved(value, device) for key, value in cast(mask.op, dtype).items()})
    for grad in (True, False):
        wanted = replace(problem_of(heads, spec, mixing), needs_grad=grad)
        reason = backend.refusal(wanted)
        if reason is not None:
            assert isinstance(reason, str) and reason.strip(), f"{name}: it refuses without a reason"
            checked.refused[reason] += 1
            continue

        def run(*tensors: Tensor) -> Tensor:
            placed = heads_of(list(tensors))
            prepared = prepare((backend,), problem_of(placed, spec, mixing), spec, automatic=False)
            return attend(placed, prepared, D**-0.5, mix)[0]

        found = values(run, inputs, _cotangent(form, layout).to(device, dtype), grad)
        assert found[0].dtype == dtype, f"{name}: the output is {found[0].dtype}"
        for what, got, right, floor in zip(NAMES, found, *_expected(case, dtype), strict=False):
            assert got.shape == right.shape, f"{name}: the {what} has shape {tuple(got.shape)}"
            error = relative_error(got.cpu(), right)
            assert error <= floor, f"{name}: the {what} is {error:.1e} off, more than {floor:.1e}"
        checked.ran.append(f"{name}, {'backward' if grad else 'forward'}")


@lru_cache(1024)
def _expected(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[float]]:
    """The oracle's answers for inputs rounded to `dtype`, and how far off each may be.

    That is twice the error of plain attention in that dtype, and a floor of a few roundings.
    """
    form, layout, kind = case
    mask = make_mask(kind, B, LAYOUTS[layout][0], L)
    inputs = [x.to(dtype) for x in problem(form, layout, mask.keys_beyond_queries)]
    cotangent = _cotangent(form, layout).to(dtype)

    arguments = {key: _rounded(value, dtype) for key, value in mask.oracle.items()}

    def answers(function: Callable[..., Tensor], at: torch.dtype) -> list[Tensor]:
        return values(lambda *x: function(*x, **arguments), [x.to(at) for x in inputs], cotangent.to(at))

    oracle = softmax.attention if form == "softmax" else differential.differential_attention
    exact = answers(oracle, torch.float64)
    if dtype == torch.float64:
        return exact, [1e-10] * len(exact)
    plain, epsilon = answers(_plain, dtype), torch.finfo(dtype).eps
    return exact, [2 * relative_error(p, e) + 16 * epsilon for p, e in zip(plain, exact, strict=True)]


def _plain(
    *inputs: Tensor, causal: bool = False, allowed: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attention as anyone would write it, in the inputs' precision with the softmax in float32."""
    heads = heads_of(inputs)
    repeats = heads.q[0].shape[1] // heads.v.shape[1]
    keys = heads.k * len(heads.q) if heads.shares_keys else heads.k
    streams = []
    for q, k in zip(heads.q, keys, strict=True):
        scores = (q @ k.repeat_interleave(repeats, 1).mT).float() * D**-0.5
        scores = scores if bias is None else scores + bias.float()
        seen = torch.ones_like(scores, dtype=torch.bool)
        seen = seen.tril(scores.shape[-1] - scores.shape[-2]) if causal else seen
        seen = seen if allowed is None else seen & allowed
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
        streams.append(weights.to(q.dtype) @ heads.v.repeat_interleave(repeats, 1))
    return streams[0] if heads.gate is None else streams[0] - heads.gate * streams[1]


def problem(form: str, layout: str, more_keys: int = 0) -> list[Tensor]:
    """q (B, streams·H, L, D), k, v and, for two streams, λ (B, H, L, 1), in float64."""
    streams, own_keys, wide = FORMS[form]
    heads, groups = LAYOUTS[layout]
    keys = L + more_keys
    inputs = [
        rand(B, streams * heads, L, D, seed=1),
        rand(B, groups * (streams if own_keys else 1), keys, D, seed=2),
        rand(B, groups, keys, wide * D, seed=3),
    ]
    return inputs if streams == 1 else [*inputs, rand(B, heads, L, 1, seed=5)]


def heads_of(inputs: Sequence[Tensor]) -> Streams:
    """The tensors of `problem` as streams."""
    q, k, v, *lam = inputs
    if not lam:
        return Streams((q,), (k,), v)
    queries = q.unflatten(1, (-1, 2)).unbind(2)
    keys = (k,) if k.shape[1] == v.shape[1] else k.unflatten(1, (-1, 2)).unbind(2)
    return Streams(tuple(queries), tuple(keys), v, lam[0])


def spec_of(arguments: dict[str, Any]) -> MaskSpec:
    """Arguments of `clearhead.functional` as one value."""
    names = {"key_padding_mask": "key_padding", "attn_mask": "dense"}
    return MaskSpec(**{names.get(name, name): value for name, value in arguments.items()})


def values(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor, grad: bool = True
) -> list[Tensor]:
    """The output, then the gradient of (output · cotangent) with respect to every input."""
    leaves = [x.detach().clone().requires_grad_(grad) for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)] if grad else [output]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; infinite where a number is NaN."""
    a, b = found.detach().double(), expected.detach().double()
    if not bool(a.isfinite().all()):
        return float("inf")
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def _cotangent(form: str, layout: str) -> Tensor:
    return rand(B, LAYOUTS[layout][0], L, FORMS[form][2] * D, seed=4)


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    # −1e9 stands for −∞ in the oracles' biases and must stay what it is.
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.where(value <= -1e9, value, value.to(dtype).to(value.dtype))


def _moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _check_maps(engine: Engine, device: str) -> None:
    inputs = [x.to(device) for x in problem("v1", "gqa")]
    heads, spec = heads_of(inputs), MaskSpec(is_causal=True)
    wanted = problem_of(heads, spec, "difference", needs_maps=True)
    if engine.refusal(wanted) is not None:
        return
    prepared = prepare((engine,), wanted, spec, automatic=False)
    try:
        maps = attend(heads, prepared, D**-0.5, difference, with_maps=True)[1]
    except (TypeError, ValueError) as cause:
        raise AssertionError(f"{engine.name}: its caps promise maps, and it returns none") from cause
    assert maps is not None
    q, k, v, lam = (x.cpu() for x in inputs)
    right = differential.differential_map(q, k, v.shape[1], lam, causal=True)
    error = relative_error(maps.cpu(), right)
    assert error <= 1e-10, f"{engine.name}: the map A1 − λ A2 is {error:.1e} off"
