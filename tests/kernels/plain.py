"""Attention written out with additions in a fixed order: how far off plain arithmetic is, on every processor alike.

What `a @ b` rounds depends on the processor's matrix library: the same float32 product is off by 2.3e-6 on one machine
and by 1.4e-6 on another. A bound made of it would pass here and fail there. Here every product of matrices is
elementwise multiplications and additions, which IEEE 754 defines to the last bit.
"""

from typing import Any

import torch
from torch import Tensor

# Products of one chain of additions; the chains of a sum are then added one after the other.
CHAIN = 64


def chained(a: Tensor, b: Tensor) -> Tensor:
    """a (..., M, K) times b (..., K, N), in chains of CHAIN float32 additions, rounded to their dtype at the end."""
    deep = a.shape[-1]
    chains = -(-deep // CHAIN)
    length = -(-deep // chains)
    missing = chains * length - deep
    left = torch.nn.functional.pad(a.float(), (0, missing)).unflatten(-1, (chains, length))
    right = torch.nn.functional.pad(b.float(), (0, 0, 0, missing)).unflatten(-2, (chains, length))
    total: Any = 0.0
    # (..., M, chains, 1) times (..., 1, chains, N): one step of all chains at once.
    for step in range(length):
        total = total + left[..., step, None] * right[..., step, :].unsqueeze(-3)
    out: Any = 0.0
    for chain in range(chains):
        out = out + total[..., chain, :]
    return out.to(a.dtype)


class Product(torch.autograd.Function):
    """a @ b by `chained`, its gradients too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return chained(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return chained(grad, b.mT), chained(a.mT, grad)


def attention(
    q: Tensor, k: Tensor, v: Tensor, lam: Any = None, *, allowed: Tensor, scale: float | None = None
) -> Tensor:
    """The op's formula as the eager engine computes it: one stream, or with `lam` two; own or shared keys.

    Logits and weights in the inputs' dtype, softmax and difference in float32; rows that see nothing give zeros.
    """
    groups, width = v.shape[1], q.shape[-1]
    streams = 1 if lam is None else 2
    heads = q.shape[1] // streams
    values, outputs = v.repeat_interleave(heads // groups, 1), []
    for s in range(streams):
        keys = k if k.shape[1] == groups else k[:, s::streams]
        keys = keys.repeat_interleave(heads // groups, 1)
        factor = width**-0.5 if scale is None else scale
        logits = Product.apply(q[:, s::streams], keys.mT).float() * factor
        empty = ~allowed.any(-1, keepdim=True)
        weights = logits.masked_fill(~allowed, float("-inf")).masked_fill(empty, 0.0).softmax(-1)
        outputs.append(Product.apply(weights.masked_fill(empty, 0.0).to(v.dtype), values))
    if lam is None:
        return outputs[0]
    return (outputs[0] - lam * outputs[1].float()).to(v.dtype)
