"""The fused CPU kernel as a backend: what it takes, where it wins, and how tensors reach the C interface."""

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from clearhead.core.dispatch import AttentionProblem, Kernel
from clearhead.core.masks import MaskSpec
from clearhead.core.quantised import Codes, Held
from clearhead.core.sparse import BlockSparse
from clearhead.core.streams import Streams
from clearhead.core.values import dtype_name
from clearhead.kernels import ops
from clearhead.kernels.cpu import direct, library

MASKS = frozenset({"causal", "padding", "documents", "window", "block_sparse"})
WIDEST = 512  # CLEARHEAD_WIDEST of src/problem.h
_MIXING = {1: "single", 2: "difference"}


class Cpu(Kernel):
    """One or two softmax maps combined and applied without being held: linear memory, float32 and bfloat16.

    The algorithm and its arithmetic are in the header comments of `src/forward.h` and `src/backward.h`.
    """

    name = "cpu"
    takes_tables = True
    takes_held = True
    leaves_out = True

    def __init__(self) -> None:
        # Looked for here, so that nothing is left to load inside `torch.compile`.
        library.missing()

    def refusal(self, problem: AttentionProblem) -> str | None:
        if problem.device != "cpu":
            return f"it runs on cpu, not on {problem.device}"
        reason = library.missing()
        if reason is not None:
            return reason
        if problem.needs_maps:
            return "it does not return attention maps"
        if problem.dtype not in direct.DTYPES:
            return f"it computes in bfloat16, float32, not in {dtype_name(problem.dtype)}"
        if _MIXING.get(problem.streams) != problem.mixing:
            return f"it knows one stream, or the difference of two, not {problem.streams} with another mixing"
        if problem.held_bits is not None and problem.needs_grad:
            return "codes of a quantised cache have no gradient"
        if problem.held_bits is not None and "documents" in problem.mask:
            return "keys of a quantised cache carry no document numbers"
        if "block_sparse" in problem.mask and problem.needs_grad:
            return "block_sparse has no gradient: leave it out, or call it under torch.no_grad()"
        if "block_sparse" in problem.mask and problem.held_bits is not None:
            return "block_sparse chooses among keys that are numbers, not the codes of a quantised cache"
        if problem.mask - MASKS:
            return f"it cannot express a mask with {', '.join(sorted(problem.mask - MASKS))}"
        widest = max(problem.key_width, problem.value_width)
        return f"it takes heads up to {WIDEST} wide, not {widest}" if widest > WIDEST else None

    def preferred(self, problem: AttentionProblem) -> bool:
        # benchmarks/results/choice.jsonl; tests/kernels/test_cpu_choice.py holds the two together.
        if library.missing() is not None or library.load().isa() == "portable":
            return False
        # Streams that share their keys are one call of PyTorch's kernel, which begins sooner in float32: that decides
        # where there is little to do.
        if problem.held_bits is not None:
            return True
        few = 512 if problem.queries <= 2 and problem.streams == 1 else 32
        return not (problem.dtype == torch.float32 and problem.shares_keys and problem.keys < few)

    def run(self, heads: Streams, mask: MaskSpec, scale: float) -> Tensor:
        q1, k1, v, gate = heads.q[0], heads.k[0], heads.v, heads.gate
        q2 = heads.q[1] if len(heads.q) == 2 else None
        k2 = heads.k[1] if len(heads.k) == 2 else None
        if gate is not None and (gate.dtype != torch.float32 or gate.shape[:3] != q1.shape[:3]):
            gate = gate.float().expand(*q1.shape[:3], 1)
        keep = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (*heads.q, *heads.k, v, gate)
        )
        shifted = isinstance(mask.offset, Tensor)
        offset = mask.offset if isinstance(mask.offset, int) else heads.keys - q1.shape[2]
        if mask.sparse is not None:
            return _run_sparse(heads.expanded(), mask, mask.sparse, gate, offset, scale)
        if not keep and mask.documents is None:
            tensors = (*heads.q, *heads.k, v, gate, heads.table, mask.key_padding)
            if direct.possible(tensors):
                return direct.forward(heads, mask, gate, offset, scale)
        if heads.held is not None:
            return _run_held(heads, heads.held, mask, gate, offset, scale)
        if heads.table is not None:
            if keep or mask.documents is not None:
                return self.run(heads.expanded(), mask, scale)
            position = mask.offset if shifted else None
            numbers = (offset, mask.window or 0, mask.is_causal, scale)
            narrow: Tensor = torch.ops.clearhead.factored_attention(
                q1, q2, k1, k2, heads.table, v, gate, mask.key_padding, position, *numbers
            )
            return narrow
        out, _, _ = torch.ops.clearhead.fused_attention(
            q1,
            q2,
            k1,
            k2,
            v,
            gate,
            mask.key_padding,
            None if mask.documents is None else mask.documents.long(),
            mask.offset if shifted else None,
            offset,
            mask.window or 0,
            mask.is_causal,
            scale,
            keep,
        )
        return out


def _run_sparse(
    heads: Streams, mask: MaskSpec, sparse: BlockSparse, gate: Tensor | None, offset: int, scale: float
) -> Tensor:
    out, _ = torch.ops.clearhead.block_sparse_attention(
        heads.q[0],
        heads.q[1] if len(heads.q) == 2 else None,
        heads.k[0],
        heads.k[1] if len(heads.k) == 2 else None,
        heads.v,
        gate,
        mask.key_padding,
        None if mask.documents is None else mask.documents.long(),
        mask.offset if isinstance(mask.offset, Tensor) else None,
        offset,
        mask.window or 0,
        mask.is_causal,
        scale,
        sparse.left_out,
        sparse.estimate == "moments",
    )
    return out


def _run_held(
    heads: Streams, held: Held, mask: MaskSpec, gate: Tensor | None, offset: int, scale: float
) -> Tensor:
    q1, k1 = heads.q[0], heads.k[0]
    q2 = heads.q[1] if len(heads.q) == 2 else None
    k2 = heads.k[1] if len(heads.k) == 2 else None
    first, second = held.keys[0], held.keys[1] if len(held.keys) == 2 else None
    codes = [part for x in (first, second, held.values) for part in _parts(x)]
    position = mask.offset if isinstance(mask.offset, Tensor) else None
    out: Tensor = torch.ops.clearhead.held_attention(
        q1,
        q2,
        k1,
        k2,
        heads.v,
        *codes,
        held.bits,
        heads.table,
        gate,
        mask.key_padding,
        position,
        offset,
        mask.window or 0,
        mask.is_causal,
        scale,
    )
    return out


def _parts(codes: Codes | None) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if codes is None else (codes.codes, codes.scale, codes.zero)


def _check_devices(*tensors: Tensor | None) -> None:
    """No memory is read that is not this processor's: a tensor elsewhere has an address that means nothing here."""
    for x in tensors:
        if x is not None and not x.is_cpu:
            raise ValueError(f"the CPU kernel was given a tensor on {x.device}; all of them must be on cpu")


def _check_level() -> None:
    """A tangent ends here without a word: also that of a gradient whose forward pass was an ordinary one."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "the fused kernel has no forward-mode derivatives, neither of its output nor of its gradients: under jvp, "
            'jacfwd and dual numbers take backend="eager"'
        )


def _tensor(x: Tensor) -> library.CTensor:
    batch, head, token = x.stride()[:3]
    return library.CTensor(x.data_ptr(), batch, head, token)


def _contiguous_width(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _dense_rows(x: Tensor) -> Tensor:
    """x, or a copy of it, whose dimensions behind the third lie as in a dense tensor."""
    return x if x[0, 0, 0].is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _row_stride(x: Tensor) -> int:
    # One row may stand for the whole batch.
    return x.stride(0) if x.shape[0] > 1 else 0


class _Call:
    """The struct that C reads for one attention, and the tensors that its pointers need kept alive."""

    def __init__(self, inputs: ops.KernelInputs) -> None:
        _check_level()
        _check_devices(*inputs[:9])
        self.q = tuple(_contiguous_width(x) for x in (inputs.q1, inputs.q2) if x is not None)
        self.k = tuple(_contiguous_width(x) for x in (inputs.k1, inputs.k2) if x is not None)
        self.v = _contiguous_width(inputs.v)
        self.masks = tuple(None if x is None else x.contiguous() for x in (inputs.padding, inputs.documents))
        batch, heads, length, width = self.q[0].shape
        self.problem = problem = library.CProblem(
            dtype=direct.DTYPES[self.v.dtype],
            streams=len(self.q),
            key_streams=len(self.k),
            causal=inputs.causal,
            threads=torch.get_num_threads(),
            scale=inputs.scale,
            batch=batch,
            heads=heads,
            groups=self.v.shape[1],
            queries=length,
            keys=self.v.shape[2],
            key_width=width,
            value_width=self.v.shape[3],
            offset=inputs.offset if inputs.position is None else int(inputs.position),
            window=inputs.window,
            v=_tensor(self.v),
        )
        for to, tensors in ((problem.q, self.q), (problem.k, self.k)):
            for i, x in enumerate(tensors):
                to[i] = _tensor(x)
        if inputs.gate is not None:
            problem.gate = _tensor(inputs.gate)
        padding, documents = self.masks
        if padding is not None:
            problem.padding, problem.padding_batch = padding.data_ptr(), _row_stride(padding)
        if documents is not None:
            problem.documents, problem.documents_batch = documents.data_ptr(), _row_stride(documents)


@torch.library.impl("clearhead::fused_attention", "CPU")  # type: ignore[untyped-decorator]
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, keep = ops.KernelInputs(*arguments[:-1]), arguments[-1]
    call = _Call(inputs)
    out, noise, statistics = ops.outputs(inputs, keep)
    call.problem.out = _tensor(out)
    if keep:
        call.problem.statistics = statistics.data_ptr()
        if noise.numel():
            call.problem.noise = _tensor(noise)
    library.load().forward(call.problem)
    return out, noise, statistics


@torch.library.impl("clearhead::factored_attention", "CPU")  # type: ignore[untyped-decorator]
def _factored(
    q1: Tensor,
    q2: Tensor | None,
    t1: Tensor,
    t2: Tensor | None,
    table: Tensor,
    v: Tensor,
    gate: Tensor | None,
    padding: Tensor | None,
    *numbers: Any,
) -> Tensor:
    call = _Call(ops.KernelInputs(q1, q2, t1, t2, v, gate, padding, None, *numbers))
    _check_devices(table)
    table = table.contiguous()
    call.problem.table = library.CTensor(table.data_ptr(), _row_stride(table), 0, table.stride(1))
    out = ops.unwritten(q1, v)
    call.problem.out = _tensor(out)
    library.load().forward(call.problem)
    return out


@torch.library.impl("clearhead::held_attention", "CPU")  # type: ignore[untyped-decorator]
def _held(q1: Tensor, q2: Tensor | None, k1: Tensor, k2: Tensor | None, v: Tensor, *rest: Any) -> Tensor:
    parts, bits, table, gate, padding, *numbers = rest[:9], *rest[9:]
    call = _Call(ops.KernelInputs(q1, q2, k1, k2, v, gate, padding, None, *numbers))
    _check_devices(table, *parts)
    problem = call.problem
    parts = tuple(None if x is None else _dense_rows(x) for x in parts)
    for to, codes in zip(
        (*problem.k_codes, problem.v_codes), (parts[:3], parts[3:6], parts[6:]), strict=True
    ):
        if codes[0] is not None:
            to.codes, to.scale, to.zero = map(_tensor, codes)
    problem.bits, problem.held = bits, parts[8].shape[3]
    problem.keys += problem.held
    if table is not None:
        table = table.contiguous()
        problem.table = library.CTensor(table.data_ptr(), _row_stride(table), 0, table.stride(1))
    out = ops.unwritten(q1, v)
    problem.out = _tensor(out)
    library.load().forward(problem)
    return out


@torch.library.impl("clearhead::block_sparse_attention", "CPU")  # type: ignore[untyped-decorator]
def _sparse(*arguments: Any) -> tuple[Tensor, Tensor]:
    *plain, left_out, moments = arguments
    inputs = ops.KernelInputs(*plain)
    call = _Call(inputs)
    out, blocks = ops.unwritten(inputs.q1, inputs.v), ops.no_blocks(inputs.v)
    problem = call.problem
    problem.out = _tensor(out)
    problem.left_out, problem.estimate, problem.blocks = left_out, moments, blocks.data_ptr()
    library.load().forward(problem)
    return out, blocks


@torch.library.impl("clearhead::fused_attention_backward", "CPU")  # type: ignore[untyped-decorator]
def _backward(
    grad: Tensor, out: Tensor, noise: Tensor, statistics: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    inputs = ops.KernelInputs(*arguments)
    call = _Call(inputs)
    _check_devices(grad, out, noise, statistics)
    problem = call.problem
    grad, out, statistics = _contiguous_width(grad), _contiguous_width(out), statistics.contiguous()
    gradients = ops.gradients(inputs)
    problem.out, problem.grad_out, problem.statistics = _tensor(out), _tensor(grad), statistics.data_ptr()
    for s in range(len(call.q)):
        problem.grad_q[s] = _tensor(gradients[s])
    for s in range(len(call.k)):
        problem.grad_k[s] = _tensor(gradients[2 + s])
    problem.grad_v = _tensor(gradients[4])
    if inputs.q2 is not None:
        problem.grad_gate = gradients[5].data_ptr()
    if noise.numel():
        noise = _contiguous_width(noise)
        problem.noise = _tensor(noise)
    library.load().backward(problem)
    return gradients
