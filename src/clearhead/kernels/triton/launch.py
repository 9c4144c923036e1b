"""From tensors to launches: which kernel, how many programs, and what memory they need.

Legend: B batch, H query heads of one stream, G key-value heads, L queries, S keys, D key width, E value width.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clearhead.kernels.triton import backward as back
from clearhead.kernels.triton import configs, endings, ranges
from clearhead.kernels.triton import forward as front

# What stands for a GPU's multiprocessors under the interpreter: enough to divide small problems.
_INTERPRETED_PROCESSORS = 8
_FAR = 2**30
# Rows of a program of `endings.deltas`.
DELTA_ROWS = 16


class TritonInputs(NamedTuple):
    """What both operators take, in the order of their schemas.

    q1, q2 (B, H, L, D); k1, k2 (B, G, S, D); v (B, G, S, E); gate (B, H, L, 1) float32; padding (B or 1, S) bool, True
    where the key is real; documents (B or 1, S) int64; position a scalar int64 that replaces offset, the position of
    the first query among the keys; slopes (H,) float32; window as in `MaskSpec`, 0 for none.
    table (B or 1, S, D) float32: k1 and k2 are then (B, G, S, D/2), see `forward.py`. weight (E,): the output is normed
    with it, eps and gain. sigmoid: the gate is that of `gate`, of any type. See `endings.py`.
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
    slopes: Tensor | None
    table: Tensor | None
    weight: Tensor | None
    offset: int
    window: int
    causal: bool
    scale: float
    eps: float
    gain: float
    sigmoid: bool


@dataclass(frozen=True)
class Shape:
    """The sizes of a problem; `rows` are those of a key-value group."""

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    width: int
    value_width: int
    streams: int

    @property
    def repeats(self) -> int:
        return self.heads // self.groups

    @property
    def rows(self) -> int:
        return self.queries * self.repeats

    @property
    def pairs(self) -> int:
        return self.batch * self.groups


def shape_of(inputs: TritonInputs) -> Shape:
    batch, heads, queries, width = inputs.q1.shape
    streams = 1 if inputs.q2 is None else 2
    groups, keys, value_width = inputs.v.shape[1:]
    return Shape(batch, heads, groups, queries, keys, width, value_width, streams)


def config_for(inputs: TritonInputs, direction: str) -> configs.Config:
    shape = shape_of(inputs)
    key = configs.Key(
        configs.architecture(inputs.v.device),
        direction,
        8 * inputs.v.element_size(),
        configs.padded(shape.width),
        configs.padded(shape.value_width),
        shape.streams,
    )
    config = configs.choose(key)
    return config if inputs.table is None else configs.for_held_keys(key, config)


def processors(device: torch.device) -> int:
    if device.type == "cpu":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def stretches(shape: Shape, config: configs.Config, device: torch.device, causal: bool) -> int:
    """T of the backward pass: enough programs a launch to fill the device, half of them empty under a causal mask."""
    wanted = math.ceil((2 if causal else 1) * processors(device) / shape.pairs)
    most = min(math.ceil(shape.keys / config.block_n), math.ceil(shape.rows / config.block_m))
    return max(1, min(wanted, most))


def splits(shape: Shape, config: configs.Config, device: torch.device) -> int:
    """Among how many programs the keys of a block of rows are divided where rows alone leave the device idle."""
    programs = math.ceil(shape.rows / config.block_m) * shape.pairs
    most = math.ceil(shape.keys / config.block_n)
    return max(1, min(2 * processors(device) // programs, most))


def precision(inputs: TritonInputs) -> str:
    """TensorFloat-32 for float32 only where PyTorch's own setting allows it."""
    if inputs.v.device.type == "cpu":
        return "interpreter"
    allowed = inputs.v.device.type == "cuda" and not torch.version.hip
    if inputs.v.dtype == torch.float32 and allowed and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def by_rows(x: Tensor) -> Tensor:
    """`x` itself if the numbers of a head lie next to each other, else a copy."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def alike(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both streams with the same strides."""
    x = by_rows(x)
    if y is None:
        return x, None
    y = by_rows(y)
    return (x, y) if x.stride() == y.stride() else (x.contiguous(), y.contiguous())


class LaunchCall:
    """The arguments that the forward and the backward kernel have in common."""

    def __init__(self, inputs: TritonInputs, config: configs.Config) -> None:
        self.shape = shape = shape_of(inputs)
        self.q1, q2 = alike(inputs.q1, inputs.q2)
        self.k1, k2 = alike(inputs.k1, inputs.k2)
        self.v = by_rows(inputs.v)
        # What is absent is some tensor that is not read.
        none = self.v
        self.q2, self.k2 = none if q2 is None else q2, none if k2 is None else k2
        self.gate = none if inputs.gate is None else inputs.gate
        self.padding = none if inputs.padding is None else inputs.padding.contiguous().view(torch.uint8)
        self.documents = none if inputs.documents is None else inputs.documents.contiguous()
        self.position = none if inputs.position is None else inputs.position
        self.slopes = none if inputs.slopes is None else inputs.slopes * math.log2(math.e)
        self.table = none if inputs.table is None else inputs.table.contiguous()
        self.weight = none if inputs.weight is None else inputs.weight.contiguous()
        width = shape.width if inputs.table is None else shape.width // 2
        # scale · log2(e): the kernels' logits are in base 2.
        self.factor = inputs.scale * math.log2(math.e)
        self.offset, self.window = inputs.offset, min(inputs.window, _FAR)
        hidden = inputs.padding is not None or inputs.documents is not None
        self.extremes = self._extremes(inputs, config) if hidden else None
        self.flags: dict[str, Any] = {
            "D": width,
            "E": shape.value_width,
            "WIDTH": configs.padded(width),
            "VALUES": configs.padded(shape.value_width),
            "REPEATS": shape.repeats,
            "STREAMS": shape.streams,
            "OWN_KEYS": inputs.k2 is not None,
            "CAUSAL": inputs.causal,
            "WINDOW": inputs.window > 0,
            "PADDING": inputs.padding is not None,
            "DOCUMENTS": inputs.documents is not None,
            "POSITION": inputs.position is not None,
            "SLOPES": inputs.slopes is not None,
            "PRECISION": precision(inputs),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
        self.ending = {"SIGMOID": inputs.sigmoid, "NORM": inputs.weight is not None}

    def _extremes(
        self, inputs: TritonInputs, config: configs.Config
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        first = inputs.offset if inputs.position is None else inputs.position
        shape = self.shape
        keys, rows = ranges.document_numbers(
            inputs.padding, inputs.documents, first, shape.rows, shape.repeats
        )
        return ranges.extremes(rows, None, config.block_m), ranges.extremes(
            keys, inputs.padding, config.block_n
        )

    def ranges(self, of_rows: bool) -> Tensor:
        """(B or 1, blocks, 2): the blocks of keys that each block of rows can see, or the other way round."""
        if self.extremes is None:
            return self.v
        rows, keys = self.extremes
        return ranges.meet(rows, keys) if of_rows else ranges.meet(keys, rows)

    def tensors(self, visible: Tensor) -> tuple[Tensor, ...]:
        return (
            *(self.q1, self.q2, self.k1, self.k2, self.v, self.gate),
            *(self.padding, self.documents, self.position, self.slopes, visible),
        )

    def strides(self, output: Tensor, visible: Tensor) -> tuple[int, ...]:
        every = [stride for x in (self.q1, self.k1, self.v, self.gate, output) for stride in x.stride()[:3]]
        return (
            *every,
            *(x.stride(0) if x.shape[0] > 1 else 0 for x in (self.padding, self.documents, visible)),
        )


def forward(
    inputs: TritonInputs, out: Tensor, noise: Tensor, statistics: Tensor, mixed: Tensor, keep: bool
) -> None:
    """Write `out`, and with `keep` the second stream's own output, each row's maximum and sum, and rows as they are
    before a norm."""
    shape = shape_of(inputs)
    config = config_for(inputs, "decode" if not keep and shape.rows <= configs.FEW_ROWS else "forward")
    count = 1 if keep else splits(shape, config, out.device)
    call = LaunchCall(inputs, config)
    visible = call.ranges(of_rows=True)
    blocks = math.ceil(shape.rows / config.block_m)
    parts = out
    if count > 1:
        left = (count, shape.pairs, shape.rows, shape.streams)
        parts = out.new_empty((*left, shape.value_width), dtype=torch.float32)
        statistics = out.new_empty((2, *left), dtype=torch.float32)
    with torch.cuda.device_of(out):
        front.forward[(blocks, shape.pairs, count)](
            *(*call.tensors(visible), call.table, call.weight),
            *(out, noise, statistics, parts, mixed),
            *(call.factor, inputs.eps, inputs.gain),
            *(shape.groups, shape.queries, shape.keys, call.offset, call.window, count),
            *call.strides(out, visible),
            *(call.table.stride(0) if call.table.shape[0] > 1 else 0, call.table.stride(1)),
            **call.flags,
            **call.ending,
            TABLE=inputs.table is not None,
            KEEP=keep,
            SPLIT=count > 1,
        )
        if count > 1:
            endings.combine[(shape.rows, shape.pairs)](
                *(parts, statistics, call.gate, call.weight, out, inputs.eps, inputs.gain),
                *(shape.groups, shape.queries, count),
                *call.gate.stride()[:3],
                *out.stride()[:3],
                E=shape.value_width,
                VALUES=call.flags["VALUES"],
                REPEATS=shape.repeats,
                STREAMS=shape.streams,
                **call.ending,
            )


def before_backward(
    call: LaunchCall,
    inputs: TritonInputs,
    grad: Tensor,
    out: Tensor,
    noise: Tensor,
    grad_gate: Tensor,
    grad_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the mixed output, its products with the streams' outputs, and λ; gradients of gate and weight.

    What a norm and a sigmoid add to the backward pass is here, where the rows of `deltas` are whole anyway.
    """
    shape, blocks = call.shape, math.ceil(call.shape.queries / DELTA_ROWS)
    size = (shape.batch, shape.heads, shape.queries)
    delta = torch.empty((shape.streams, *size), dtype=torch.float32, device=grad.device)
    gate, mixed_grad, sums = call.gate, grad, delta
    if inputs.sigmoid:
        gate = delta.new_empty((*size, 1))
    if inputs.weight is not None:
        mixed_grad = torch.empty_like(out)
        sums = delta.new_empty((shape.batch * shape.heads * blocks, shape.value_width))
    endings.deltas[(blocks, shape.batch * shape.heads)](
        *(grad, out, noise, call.gate, call.weight, delta, gate, grad_gate, mixed_grad, sums),
        *(inputs.eps, inputs.gain, shape.heads, shape.queries),
        *(stride for x in (grad, out, noise, call.gate, mixed_grad) for stride in x.stride()[:3]),
        E=shape.value_width,
        VALUES=call.flags["VALUES"],
        STREAMS=shape.streams,
        **call.ending,
        BLOCK_M=DELTA_ROWS,
    )
    if inputs.weight is not None:
        grad_weight.copy_(sums.sum(0))
    return mixed_grad, delta, gate


def backward(
    inputs: TritonInputs,
    grad: Tensor,
    out: Tensor,
    noise: Tensor,
    statistics: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """Write the gradients of q1, q2, k1, k2, v, gate and weight, as far as there are such inputs.

    out: the rows before a norm, where there is one.
    """
    shape, config = shape_of(inputs), config_for(inputs, "backward")
    call = LaunchCall(inputs, config)
    visible = call.ranges(of_rows=False)
    grad, out, statistics = by_rows(grad), by_rows(out), statistics.contiguous()
    noise = by_rows(noise) if shape.streams == 2 else out
    size = (shape.batch, shape.heads, shape.queries)
    sums_q = statistics.new_zeros((shape.streams, *size, shape.width))
    own_keys = inputs.k2 is not None
    in_keys = (shape.batch, shape.groups, shape.keys)
    sums_k = statistics.new_zeros((1 + own_keys, *in_keys, shape.width))
    sums_v = statistics.new_zeros((*in_keys, shape.value_width))
    count = stretches(shape, config, grad.device, inputs.causal)

    def share(total: int, block: int) -> int:
        return math.ceil(math.ceil(total / block) / count) * block

    with torch.cuda.device_of(grad):
        grad, delta, call.gate = before_backward(call, inputs, grad, out, noise, *gradients[5:])
        for wave in range(count):
            back.backward[(count, shape.pairs)](
                *call.tensors(visible),
                *(grad, statistics, delta, sums_q[0], sums_q[-1], sums_k[0], sums_k[-1], sums_v),
                *(call.factor, shape.groups, shape.queries, shape.keys, call.offset, call.window, wave),
                *(share(shape.keys, config.block_n), share(shape.rows, config.block_m)),
                *call.strides(grad, visible),
                **call.flags,
            )
    q1, q2, k1, k2, v = gradients[:5]
    for stream, gradient in enumerate((q1, q2)[: shape.streams]):
        finish(gradient, sums_q[stream], inputs.scale)
    for stream, gradient in enumerate((k1, k2)[: 1 + own_keys]):
        finish(gradient, sums_k[stream], inputs.scale)
    finish(v, sums_v, 1.0)


def finish(gradient: Tensor, total: Tensor, scale: float) -> None:
    """Round a float32 sum into `gradient`."""
    torch.mul(total, scale, out=gradient)
