"""The operators behind the fused kernels: schemas, shapes and gradients, in torch alone.

    fused_attention(q1, q2?, k1, k2?, v, gate?, ...) -> out, noise, statistics

softmax(scale · q1 k1ᵀ + mask) v, or with q2 and gate (softmax(scale · q1 k1ᵀ) − gate · softmax(scale · q2 k2ᵀ)) v;
without k2 both streams read k1. A device's kernel implements `fused_attention` and `fused_attention_backward` for its
dispatch key (`clearhead.kernels.cpu.kernel` for CPU). `noise` is the second stream's own output and `statistics`
(streams, 2, B, H, L) each row's reference logit and sum; both are empty unless `keep` asks for them, which the gradient
needs, and `noise` also where it would be larger than MOST_NOISE.

    factored_attention(q1, q2?, t1, t2?, table, v, gate?, ...) -> out

the same without gradients, of keys that are held at half their width: key n is (t_n ∘ first half of table_n, t_n ∘
second half).

    held_attention(q1, q2?, k1, k2?, v, codes..., bits, table?, gate?, ...) -> out

the same without gradients where the first keys and values are the codes of `core.quantised` and k and v continue them.

    block_sparse_attention(q1, q2?, k1, k2?, v, gate?, ..., left_out, moments) -> out, blocks

the same without gradients, of the blocks of keys that matter (`core.sparse`); `blocks` (3,) counts pairs of 64 queries
and 128 keys: those that are seen, whose logits were computed, and whose values were used; all 0 where 64 rows or fewer
share their keys, as nothing is left out there.

Legend: B batch, H query heads of one stream, G key-value heads, L queries, S keys, D key width, E value width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes of `noise` that are kept for the gradient. Beyond them it is left out, and the backward pass computes what it
# needs of it again: about a fifth more work for a sixth less memory.
MOST_NOISE = 48 * 2**20

_INPUTS = (
    "Tensor q1, Tensor? q2, Tensor k1, Tensor? k2, Tensor v, Tensor? gate, Tensor? padding, Tensor? documents, "
    "Tensor? position, SymInt offset, SymInt window, bool causal, float scale"
)

torch.library.define(
    "clearhead::fused_attention", f"({_INPUTS}, bool keep) -> (Tensor out, Tensor noise, Tensor statistics)"
)
torch.library.define(
    "clearhead::fused_attention_backward",
    f"(Tensor grad, Tensor out, Tensor noise, Tensor statistics, {_INPUTS}) -> "
    "(Tensor q1, Tensor q2, Tensor k1, Tensor k2, Tensor v, Tensor gate)",
)


torch.library.define(
    "clearhead::factored_attention",
    "(Tensor q1, Tensor? q2, Tensor t1, Tensor? t2, Tensor table, Tensor v, Tensor? gate, Tensor? padding, "
    "Tensor? position, SymInt offset, SymInt window, bool causal, float scale) -> Tensor",
)

_CODES = ", ".join(
    f"Tensor{end} {name}_{part}"
    for name, end in (("k1", ""), ("k2", "?"), ("v", ""))
    for part in ("codes", "scale", "zero")
)
torch.library.define(
    "clearhead::held_attention",
    f"(Tensor q1, Tensor? q2, Tensor k1, Tensor? k2, Tensor v, {_CODES}, int bits, Tensor? table, Tensor? gate, "
    "Tensor? padding, Tensor? position, SymInt offset, SymInt window, bool causal, float scale) -> Tensor",
)
torch.library.define(
    "clearhead::block_sparse_attention",
    f"({_INPUTS}, float left_out, bool moments) -> (Tensor out, Tensor blocks)",
)


class KernelInputs(NamedTuple):
    """What both operators take, in the order of their schemas.

    q1, q2 (B, H, L, D); k1, k2 (B, G, S, D); v (B, G, S, E); gate (B, H, L, 1) float32; padding (B or 1, S) bool, True
    where the key is real; documents (B or 1, S) int64; position a scalar int64 that replaces offset, the position of
    the first query among the keys; window as in `MaskSpec`, 0 for none.
    """

    q1: Tensor
    q2: Tensor | None
    k1: Tensor
    k2: Tensor | None
    v: Tensor
    gate: Tensor | None
    padding: Tensor | None
    documents: Tensor | None
    position: Tensor | None
    offset: int
    window: int
    causal: bool
    scale: float


def outputs(inputs: KernelInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten `out`, `noise` and `statistics`."""
    q1, q2, v = inputs.q1, inputs.q2, inputs.v
    batch, heads, queries = q1.shape[:3]
    size = (batch, queries, heads, v.shape[3])
    out = unwritten(q1, v)
    if not keep:
        return out, v.new_empty(0), q1.new_empty(0, dtype=torch.float32)
    streams = 1 if q2 is None else 2
    large = batch * heads * queries * v.shape[3] * v.element_size() > MOST_NOISE
    noise = v.new_empty(0) if q2 is None or large else v.new_empty(size).transpose(1, 2)
    return out, noise, q1.new_empty((streams, 2, batch, heads, queries), dtype=torch.float32)


def unwritten(q: Tensor, v: Tensor) -> Tensor:
    """(B, H, L, E) for an output; tokens outermost, so that merging the heads costs nothing."""
    batch, heads, queries = q.shape[:3]
    return v.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)


def no_blocks(v: Tensor) -> Tensor:
    """The counts that `block_sparse_attention` begins with."""
    return torch.zeros(3, dtype=torch.int64, device=v.device)


def gradients(inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unwritten gradients of q1, q2, k1, k2, v and gate, empty where there is no such input."""

    q1, q2, v = inputs.q1, inputs.q2, inputs.v

    def like(x: Tensor | None) -> Tensor:
        if x is None:
            return v.new_empty(0)
        gradient = torch.empty_like(x)
        # Strides of a view whose elements overlap, or that is no row of numbers, are not those of a gradient.
        return gradient if gradient.stride(3) == 1 else x.new_empty(x.shape)

    gate = q1.new_empty(0 if q2 is None else (*q1.shape[:3], 1), dtype=torch.float32)
    return like(q1), like(q2), like(inputs.k1), like(inputs.k2), like(v), gate


def _agree(v: Tensor, *others: Any) -> None:
    """PyTorch asks for shapes alone where one tensor is on meta, and would take what is unwritten for an answer."""
    for x in others:
        if isinstance(x, Tensor) and x.device != v.device:
            raise ValueError(
                f"a fused kernel was given tensors on {v.device} and on {x.device}; they must agree"
            )


@torch.library.register_fake("clearhead::fused_attention")  # type: ignore[untyped-decorator]
def _(*call: Any) -> tuple[Tensor, Tensor, Tensor]:
    _agree(call[4], *call)
    return outputs(KernelInputs(*call[:-1]), call[-1])


@torch.library.register_fake("clearhead::fused_attention_backward")  # type: ignore[untyped-decorator]
def _(grad: Tensor, out: Tensor, noise: Tensor, statistics: Tensor, *call: Any) -> tuple[Tensor, ...]:
    _agree(call[4], grad, out, noise, statistics, *call)
    return gradients(KernelInputs(*call))


@torch.library.register_fake("clearhead::factored_attention")  # type: ignore[untyped-decorator]
def _(
    q1: Tensor, q2: Tensor | None, t1: Tensor, t2: Tensor | None, table: Tensor, v: Tensor, *rest: Any
) -> Tensor:
    _agree(v, q1, q2, t1, t2, table, *rest)
    return unwritten(q1, v)


@torch.library.register_fake("clearhead::held_attention")  # type: ignore[untyped-decorator]
def _(q1: Tensor, q2: Tensor | None, k1: Tensor, k2: Tensor | None, v: Tensor, *rest: Any) -> Tensor:
    _agree(v, q1, q2, k1, k2, *rest)
    return unwritten(q1, v)


@torch.library.register_fake("clearhead::block_sparse_attention")  # type: ignore[untyped-decorator]
def _(*call: Any) -> tuple[Tensor, Tensor]:
    _agree(call[4], *call)
    return unwritten(call[0], call[4]), no_blocks(call[4])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *call, keep = inputs
    if not keep:
        raise RuntimeError(
            "fused_attention was asked for a gradient but not to keep what it needs (keep=True)"
        )
    tensors, ctx.numbers = call[:9], call[9:]
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    saved = ctx.saved_tensors
    q1, q2, k1, k2, v, gate = torch.ops.clearhead.fused_attention_backward(grad, *saved, *ctx.numbers)
    second, own_keys = saved[4] is not None, saved[6] is not None
    return (
        q1,
        q2 if second else None,
        k1,
        k2 if own_keys else None,
        v,
        gate if second else None,
        *(None,) * 8,
    )


def _refuse(ctx: Any, *unused: Tensor | None) -> None:
    raise RuntimeError(
        'the fused kernel has no second derivative: take backend="eager" to differentiate twice'
    )


torch.library.register_autograd("clearhead::fused_attention", _differentiate, setup_context=_save)
torch.library.register_autograd("clearhead::fused_attention_backward", _refuse)
