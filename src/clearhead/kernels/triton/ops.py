"""The operators behind the Triton kernels: schemas, shapes and gradients.

    triton_attention(q1, q2?, k1, k2?, v, gate?, ...) -> out, noise, statistics, mixed

softmax(scale · q1 k1ᵀ + mask) v, or with q2 and gate (softmax(scale · q1 k1ᵀ) − gate · softmax(scale · q2 k2ᵀ)) v;
without k2 both streams read k1. `noise` is the second stream's own output and `statistics` (streams, 2, B, H, L) each
row's greatest logit in base 2 and its sum; both are empty unless `keep` asks for them, which the gradient needs. With
sigmoid the gate is σ(gate), with a weight `out` is gain · RMSNorm of the rows, and `mixed` those rows, if kept; with a
table keys are held at half their width (`launch.TritonInputs`), which has no gradient.

`triton` and the kernels are imported when an operator runs for the first time.
"""

from typing import Any

import torch
from torch import Tensor

_INPUTS = (
    "Tensor q1, Tensor? q2, Tensor k1, Tensor? k2, Tensor v, Tensor? gate, Tensor? padding, Tensor? documents, "
    "Tensor? position, Tensor? slopes, Tensor? table, Tensor? weight, SymInt offset, SymInt window, bool causal, "
    "float scale, float eps, float gain, bool sigmoid"
)
_TENSORS, _NUMBERS = 12, 7
_TABLE, _WEIGHT = 10, 11

torch.library.define(
    "clearhead::triton_attention",
    f"({_INPUTS}, bool keep) -> (Tensor out, Tensor noise, Tensor statistics, Tensor mixed)",
)
torch.library.define(
    "clearhead::triton_attention_backward",
    f"(Tensor grad, Tensor out, Tensor noise, Tensor statistics, {_INPUTS}) -> "
    "(Tensor q1, Tensor q2, Tensor k1, Tensor k2, Tensor v, Tensor gate, Tensor weight)",
)


def outputs(
    q1: Tensor, q2: Tensor | None, v: Tensor, normed: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten `out`, `noise`, `statistics` and `mixed`; tokens outermost, so that merging the heads costs nothing."""
    batch, heads, queries = q1.shape[:3]
    size = (batch, queries, heads, v.shape[3])
    out = v.new_empty(size).transpose(1, 2)
    if not keep:
        return out, v.new_empty(0), q1.new_empty(0, dtype=torch.float32), v.new_empty(0)
    streams = 1 if q2 is None else 2
    noise = v.new_empty(0) if q2 is None else v.new_empty(size).transpose(1, 2)
    mixed = v.new_empty(size).transpose(1, 2) if normed else v.new_empty(0)
    return out, noise, q1.new_empty((streams, 2, batch, heads, queries), dtype=torch.float32), mixed


def gradients(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Unwritten gradients of q1, q2, k1, k2, v, gate and weight of an operator's inputs, empty where there is none."""
    q1, q2, k1, k2, v, gate = tensors[:6]
    weight = tensors[_WEIGHT]
    assert q1 is not None and k1 is not None and v is not None

    def like(x: Tensor | None) -> Tensor:
        if x is None:
            return v.new_empty(0)
        gradient = torch.empty_like(x)
        # Strides of a view whose elements overlap, or that is no row of numbers, are not those of a gradient.
        return gradient if gradient.stride(3) == 1 else x.new_empty(x.shape)

    to_gate = v.new_empty(0) if gate is None else gate.new_empty((*q1.shape[:3], 1))
    to_weight = v.new_empty(0) if weight is None else torch.empty_like(weight)
    return like(q1), like(q2), like(k1), like(k2), like(v), to_gate, to_weight


@torch.library.register_fake("clearhead::triton_attention")  # type: ignore[untyped-decorator]
def _(q1: Tensor, q2: Tensor | None, k1: Tensor, k2: Tensor | None, v: Tensor, *rest: Any) -> Any:
    return outputs(q1, q2, v, rest[_WEIGHT - 5] is not None, rest[-1])


@torch.library.register_fake("clearhead::triton_attention_backward")  # type: ignore[untyped-decorator]
def _(grad: Tensor, out: Tensor, noise: Tensor, statistics: Tensor, *call: Any) -> tuple[Tensor, ...]:
    return gradients(*call[:_TENSORS])


# "cpu" for Triton's interpreter.
@torch.library.impl("clearhead::triton_attention", ("cpu", "cuda"))  # type: ignore[untyped-decorator]
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from clearhead.kernels.triton import launch

    inputs, keep = launch.TritonInputs(*arguments[:-1]), arguments[-1]
    results = outputs(inputs.q1, inputs.q2, inputs.v, inputs.weight is not None, keep)
    launch.forward(inputs, *results, keep)
    return results


@torch.library.impl("clearhead::triton_attention_backward", ("cpu", "cuda"))  # type: ignore[untyped-decorator]
def _backward(
    grad: Tensor, out: Tensor, noise: Tensor, statistics: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    from clearhead.kernels.triton import launch

    inputs = launch.TritonInputs(*arguments)
    results = gradients(*arguments[:_TENSORS])
    launch.backward(inputs, grad, out, noise, statistics, results)
    return results


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *call, keep = inputs
    if call[_TABLE] is not None:
        raise RuntimeError("triton_attention has no gradient for keys that are held at half their width")
    if not keep:
        raise RuntimeError(
            "triton_attention was asked for a gradient but not to keep what it needs (keep=True)"
        )
    tensors, ctx.numbers = call[:_TENSORS], call[_TENSORS:]
    # The rows before the norm, in place of those behind it.
    out, noise, statistics, mixed = output
    ctx.save_for_backward(out if call[_WEIGHT] is None else mixed, noise, statistics, *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (_TENSORS + _NUMBERS + 1)
    saved = ctx.saved_tensors
    q1, q2, k1, k2, v, gate, weight = torch.ops.clearhead.triton_attention_backward(
        grad, *saved, *ctx.numbers
    )
    second, own_keys, normed = saved[4] is not None, saved[6] is not None, saved[3 + _WEIGHT] is not None
    return (
        q1,
        q2 if second else None,
        k1,
        k2 if own_keys else None,
        v,
        gate if second else None,
        *(None,) * (_WEIGHT - 6),
        weight if normed else None,
        *(None,) * (_NUMBERS + 1),
    )


def _refuse(ctx: Any, *unused: Tensor | None) -> None:
    raise RuntimeError(
        'the fused kernel has no second derivative: take backend="eager" to differentiate twice'
    )


torch.library.register_autograd("clearhead::triton_attention", _differentiate, setup_context=_save)
torch.library.register_autograd("clearhead::triton_attention_backward", _refuse)
