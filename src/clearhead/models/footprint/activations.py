"""What a forward pass keeps for its backward pass: a real layer, run on the meta device, and what autograd saves of it.

So it is the layer's own code that is counted, whatever the variant; only the softmax attention itself is a stand-in: a
fused kernel, which keeps queries, keys, values, its output and one float32 number a query and head.

Legend: B rows, L tokens of a row, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from clearhead.core.dispatch import AttentionProblem, plan
from clearhead.core.lowering import Lowering, lower, unlower_streams
from clearhead.core.masks import MaskSpec
from clearhead.core.norm import RMSNorm
from clearhead.core.streams import merge_heads
from clearhead.models.blocks import ClearheadDecoderLayer
from clearhead.models.config import ClearheadConfig


@dataclass(frozen=True)
class KeptActivations:
    """Bytes on one device for its rows, kept from the forward pass until the backward pass.

    layers:  of each layer.         inputs: of what a layer is given, which is all that checkpointing keeps of it.
    head:    of the last norm.      loss:   what the logits and their loss take at their largest, which is when the
        backward pass begins: their log-softmax and two gradients of its size, in float32.
    mask:    of one dense mask for all layers, where packed documents need it.
    """

    layers: tuple[int, ...]
    inputs: int
    head: int
    loss: int
    mask: int

    def kept(self, checkpointing: bool) -> int:
        """Bytes when the backward pass begins, the loss left out."""
        layers = len(self.layers) * self.inputs if checkpointing else sum(self.layers)
        return layers + self.head + self.mask

    @property
    def largest(self) -> int:
        """Bytes of the layer that keeps most: what checkpointing computes again at once."""
        return max(self.layers)


def activations(
    config: ClearheadConfig,
    rows: int,
    length: int,
    dtype: torch.dtype,
    device: str = "cuda",
    *,
    documents: bool = False,
) -> KeptActivations:
    """The activations of `rows` rows of `length` tokens in a model that computes in `dtype` on a kind of device.

    documents: whether rows are packed, whose mask SDPA takes as a dense one.
    """
    kinds = config.layer_kinds
    measured: dict[Any, int] = {}
    for layer, kind in enumerate(kinds):
        if kind not in measured:
            measured[kind] = _layer(config, layer, rows, length, dtype, device)
    tokens = rows * length
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps).to(dtype)
        x = torch.empty(rows, length, config.hidden_size, dtype=dtype, requires_grad=True)
        head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
    kept = _Kept(norm, head)
    with kept.watch():
        head(norm(x))
    return KeptActivations(
        layers=tuple(measured[kind] for kind in kinds),
        inputs=tokens * config.hidden_size * dtype.itemsize,
        head=kept.bytes,
        loss=3 * tokens * config.vocab_size * torch.float32.itemsize,
        mask=rows * length * length * dtype.itemsize if documents else 0,
    )


def _layer(
    config: ClearheadConfig, layer: int, rows: int, length: int, dtype: torch.dtype, device: str
) -> int:
    with torch.device("meta"):
        block = ClearheadDecoderLayer(config, layer).to(dtype)
        x = torch.empty(rows, length, config.hidden_size, dtype=dtype, requires_grad=True)
        positions = torch.arange(length)[None]
        position = config.make_positions()[config.layer_kinds[layer].position].to("meta")
        rotation = position.rotation(positions)
    lowering = _lowering(config, layer, length, dtype, device)
    attention = block.self_attn
    kept = _Kept(block)
    with kept.watch():
        normed = block.input_layernorm(x)
        heads = attention.project(normed, normed, rotation)
        outputs = [_Fused.apply(call.q, call.k, call.v) for call in lower(heads, lowering)]
        mixed = attention.variant.mix(unlower_streams(outputs, lowering, heads.v.shape[1]), heads.gate)
        y = x + attention.o_proj(merge_heads(attention.variant.finish(mixed)))
        out = y + block.mlp(block.post_attention_layernorm(y))
    del out
    return kept.bytes


def _lowering(config: ClearheadConfig, layer: int, length: int, dtype: torch.dtype, device: str) -> Lowering:
    """As SDPA runs it on that kind of device."""
    variant = config.make_variant(layer)
    problem = AttentionProblem.of_widths(
        variant.sizes,
        queries=length,
        keys=length,
        mask=MaskSpec(is_causal=True),
        mixing=variant.mixing,
        dtype=dtype,
        device=torch.device(device),
        needs_grad=True,
        needs_maps=False,
    )
    found = plan(problem, "sdpa").lowering
    assert found is not None
    return found


class _Kept:
    """Counts every storage that autograd saves while it watches once, parameters left out."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        self.weights = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
        # Held, so that no address is used twice.
        self.storages: dict[int, Any] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.storages[storage._cdata] = storage
        return tensor

    def watch(self) -> saved_tensors_hooks:
        """A context whose forward pass is counted."""
        return saved_tensors_hooks(self._pack, lambda packed: packed)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


class _Fused(torch.autograd.Function):
    """Stands in for a fused kernel: what it keeps, nothing that it computes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.new_empty(*q.shape[:-1], v.shape[-1])
        statistics = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, output, statistics)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("nothing is computed on the meta device")
