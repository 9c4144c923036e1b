"""A call of the kernel's forward pass with little in front of it, for decoding.

`torch.ops.clearhead.*` are what gradients, compiled graphs and everything that watches operators need. Where nothing
of this is there, a call does not go through them: the struct that C reads is written at once, in memory that a thread
keeps.
"""

import struct
import threading
from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from clearhead.core.masks import MaskSpec
from clearhead.core.quantised import Codes, Held
from clearhead.core.streams import Streams
from clearhead.kernels.cpu import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# The fields of `CProblem` in their order: numbers, masks, q to out. What the backward pass has follows, then codes and
# block sparsity; the first and the last are never set here.
_FIELDS = struct.Struct("=5if9q4q32q")
_CODES = struct.Struct("=2q36q")
_NONE = (0, 0, 0, 0)
_NO_CODES: tuple[int, ...] = (0, 0, *_NONE * 9)
assert _FIELDS.size == library.CProblem.noise.offset
assert _CODES.size == library.CProblem.left_out.offset - library.CProblem.bits.offset


class _Memory(threading.local):
    """A struct for each thread: C reads it while other threads may write theirs."""

    def __init__(self) -> None:
        self.problem = library.CProblem()
        self.view = memoryview(self.problem).cast("B")
        self.has_codes = False


_memory = _Memory()


def possible(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing but the numbers of these is asked for: no graph, no mode, no subclass, no profiler.

    Views whose sign is only noted, and zeros without memory, have no numbers that C could read.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    return all(x is None or _readable(x) for x in tensors)


def _readable(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.is_cpu and not x.is_neg() and not x._is_zerotensor()


def forward(heads: Streams, mask: MaskSpec, gate: Tensor | None, offset: int, scale: float) -> Tensor:
    """The mixed output (B, H, L, E) of what `Cpu` takes, without documents and without a gradient."""
    held, table, padding = heads.held, heads.table, mask.key_padding
    q, k, v = heads.q, heads.k, heads.v
    for x in (*q, *k, v):
        if x.stride(3) != 1 and x.shape[3] != 1:
            q, k, v = tuple(map(_dense, q)), tuple(map(_dense, k)), _dense(v)
            break
    if isinstance(mask.offset, Tensor):
        offset = int(mask.offset)
    batch, count, queries, width = q[0].shape
    # As `ops.unwritten`, in one call.
    wide = v.shape[3]
    size, strides = (batch, count, queries, wide), (queries * count * wide, wide, count * wide, 1)
    out = v.new_empty_strided(size, strides)
    if padding is not None:
        padding = padding.contiguous()
    if table is not None:
        table = table.contiguous()
    memory = _memory
    # Copies, where there are any, live in `owners` until C is done.
    owners = () if held is None else tuple(map(dense, (*held.keys, held.values)))
    if owners or memory.has_codes:
        _write_codes(memory, held, owners)
    _FIELDS.pack_into(
        memory.view,
        0,
        DTYPES[v.dtype],
        len(q),
        len(k),
        mask.is_causal,
        torch.get_num_threads(),
        scale,
        batch,
        count,
        v.shape[1],
        queries,
        heads.keys,
        width,
        wide,
        offset,
        mask.window or 0,
        0 if padding is None else padding.data_ptr(),
        0 if padding is None or padding.shape[0] == 1 else padding.stride(0),
        0,
        0,
        *place(q[0]),
        *(place(q[1]) if len(q) == 2 else _NONE),
        *place(k[0]),
        *(place(k[1]) if len(k) == 2 else _NONE),
        *place(v),
        *(_NONE if table is None else place_of_table(table)),
        *(_NONE if gate is None else place(gate)),
        *place(out),
    )
    library.load().forward(memory.problem)
    return out


def _write_codes(memory: _Memory, held: Held | None, owners: tuple[Codes, ...]) -> None:
    """Put codes into the struct, or take those of an earlier call out of it."""
    codes = _NO_CODES
    if held is not None:
        own = [(*place(x.codes), *place(x.scale), *place(x.zero)) for x in owners]
        codes = (held.bits, held.tokens, *own[0], *(own[1] if len(own) == 3 else _NONE * 3), *own[-1])
    _CODES.pack_into(memory.view, library.CProblem.bits.offset, *codes)
    memory.has_codes = held is not None


def place(x: Tensor) -> tuple[int, ...]:
    """Address and strides of the first three dimensions, as `CTensor` has them."""
    return x.data_ptr(), *x.stride()[:3]


def place_of_table(table: Tensor) -> tuple[int, ...]:
    """The same of (B or 1, S, D): one row may stand for the whole batch."""
    return table.data_ptr(), table.stride(0) if table.shape[0] > 1 else 0, 0, table.stride(1)


def dense(codes: Codes) -> Codes:
    """The same whose tensors lie, behind the third dimension, as in a dense tensor."""
    lanes = codes.codes.shape[4] * 4
    if codes.codes.stride()[3:] == (lanes, 4, 1) and codes.scale.stride(3) == codes.zero.stride(3) == 1:
        return codes
    return codes.mapped(lambda x: x.clone(memory_format=torch.contiguous_format))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
