"""The operators behind the Triton kernels: schemas, shapes and gradients.

    triton_attention(q1, q2?, k1, k2?, v, gate?, ...) -> out, noise, statistics

softmax(scale · q1 k1ᵀ + mask) v, or with q2 and gate (softmax(scale · q1 k1ᵀ) − gate · softmax(scale · q2 k2ᵀ)) v;
without k2 both streams read k1. `noise` is the second stream's own output and `statistics` (streams, 2, B, H, L) each
row's greatest logit in base 2 and its sum; both are empty unless `keep` asks for them, which the gradient needs.

`triton` and the kernels are imported when an operator runs for the first time.
"""

from typing import Any

import torch
from torch import Tensor

_INPUTS = (
    "Tensor q1, Tensor? q2, Tensor k1, Tensor? k2, Tensor v, Tensor? gate, Tensor? padding, Tensor? documents, "
    "Tensor? position, Tensor? slopes, SymInt offset, SymInt window, bool causal, float scale"
)
_TENSORS = 10

torch.library.define(
    "clearhead::triton_attention", f"({_INPUTS}, bool keep) -> (Tensor out, Tensor noise, Tensor statistics)"
)
torch.library.define(
    "clearhead::triton_attention_backward",
    f"(Tensor grad, Tensor out, Tensor noise, Tensor statistics, {_INPUTS}) -> "
    "(Tensor q1, Tensor q2, Tensor k1, Tensor k2, Tensor v, Tensor gate)",
)


def outputs(q1: Tensor, q2: Tensor | None, v: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten `out`, `noise` and `statistics`; tokens outermost, so that merging the heads costs nothing."""
    batch, heads, queries = q1.shape[:3]
    size = (batch, queries, heads, v.shape[3])
    out = v.new_empty(size).transpose(1, 2)
    if not keep:
        return out, v.new_empty(0), q1.new_empty(0, dtype=torch.float32)
    streams = 1 if q2 is None else 2
    noise = v.new_empty(0) if q2 is None else v.new_empty(size).transpose(1, 2)
    return out, noise, q1.new_empty((streams, 2, batch, heads, queries), dtype=torch.float32)


def gradients(
    q1: Tensor, q2: Tensor | None, k1: Tensor, k2: Tensor | None, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unwritten gradients of q1, q2, k1, k2, v and gate, empty where there is no such input."""

    def like(x: Tensor | None) -> Tensor:
        if x is None:
            return v.new_empty(0)
        gradient = torch.empty_like(x)
        # Strides of a view whose elements overlap, or that is no row of numbers, are not those of a gradient.
        return gradient if gradient.stride(3) == 1 else x.new_empty(x.shape)

    gate = q1.new_empty(0 if q2 is None else (*q1.shape[:3], 1), dtype=torch.float32)
    return like(q1), like(q2), like(k1), like(k2), like(v), gate


@torch.library.register_fake("clearhead::triton_attention")  # type: ignore[untyped-decorator]
def _(q1: Tensor, q2: Tensor | None, k1: Tensor, k2: Tensor | None, v: Tensor, *rest: Any) -> Any:
    return outputs(q1, q2, v, rest[-1])


@torch.library.register_fake("clearhead::triton_attention_backward")  # type: ignore[untyped-decorator]
def _(grad: Tensor, out: Tensor, noise: Tensor, statistics: Tensor, *call: Any) -> tuple[Tensor, ...]:
    return gradients(*call[:5])


# "cpu" for Triton's interpreter.
@torch.library.impl("clearhead::triton_attention", ("cpu", "cuda"))  # type: ignore[untyped-decorator]
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from clearhead.kernels.triton import launch

    inputs, keep = launch.TritonInputs(*arguments[:-1]), arguments[-1]
    results = outputs(inputs.q1, inputs.q2, inputs.v, keep)
    launch.forward(inputs, *results, keep)
    return results


@torch.library.impl("clearhead::triton_attention_backward", ("cpu", "cuda"))  # type: ignore[untyped-decorator]
def _backward(
    grad: Tensor, out: Tensor, noise: Tensor, statistics: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    from clearhead.kernels.triton import launch

    inputs = launch.TritonInputs(*arguments)
    results = gradients(*arguments[:5])
    launch.backward(inputs, grad, out, noise, statistics, results)
    return results


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *call, keep = inputs
    if not keep:
        raise RuntimeError(
            "triton_attention was asked for a gradient but not to keep what it needs (keep=True)"
        )
    tensors, ctx.numbers = call[:_TENSORS], call[_TENSORS:]
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 15
    saved = ctx.saved_tensors
    q1, q2, k1, k2, v, gate = torch.ops.clearhead.triton_attention_backward(grad, *saved, *ctx.numbers)
    second, own_keys = saved[4] is not None, saved[6] is not None
    return (
        q1,
        q2 if second else None,
        k1,
        k2 if own_keys else None,
        v,
        gate if second else None,
        *(None,) * 9,
    )


def _refuse(ctx: Any, *unused: Tensor | None) -> None:
    raise RuntimeError(
        'the fused kernel has no second derivative: take backend="eager" to differentiate twice'
    )


torch.library.register_autograd("clearhead::triton_attention", _differentiate, setup_context=_save)
torch.library.register_autograd("clearhead::triton_attention_backward", _refuse)
