"""Looking at queries and keys while a model reads: by way of the variant, or of Hugging Face's attention interface.

Legend: B batch, H query heads of one stream, G key-value heads, N tokens, D key width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from clearhead.core.heads import Heads
from clearhead.evals.probing.rescaling import rotary_modules
from clearhead.positions.base import Position, Rotation
from clearhead.positions.interchange import INTERLEAVED
from clearhead.variants.base import Variant
from clearhead.variants.placement import CollinearPlacement

NAME = "clearhead_recording"

Pairs = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recorded:
    """One layer's streams in one forward pass, without a cache.

    q: (B, H, N, D) a stream, k: (B, G, N, D) a stream: as the softmax takes them, at their positions.
    scale: of the logits. slopes: (H,) of ALiBi, or None.
    pairs: the first and second components of the pairs that the position method turns, in order of falling frequency;
        None without rotation. It may leave out components that are not turned.
    before: the heads as the projections gave them, where that is known: in this library's models.
    placement: what makes them collinear, if something does.
    window: the keys that a query sees, its own among them; None for all. Not known of other models.
    """

    layer: int
    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    scale: float
    slopes: Tensor | None = None
    pairs: Pairs | None = None
    before: Heads | None = None
    placement: CollinearPlacement | None = None
    window: int | None = None


Record = Callable[[Recorded], None]
_listener: ContextVar[tuple[Record, Pairs | None] | None] = ContextVar("clearhead_recorder", default=None)


@contextmanager
def recorded(model: PreTrainedModel, record: Record) -> Iterator[None]:
    """Inside, every layer of every forward pass hands its streams to `record`; the model computes what it did.

    Raises ValueError for a model whose attention cannot be listened to.
    """
    listen = _ours if model.config.to_dict().get("model_type") == "clearhead" else _theirs
    with listen(model, record):
        yield


@contextmanager
def _ours(model: Any, record: Record) -> Iterator[None]:
    """`model` is a ClearheadForCausalLM; the variant's `place` sees the streams before and after."""
    decoder = model.model
    with ExitStack() as stack:
        for index, layer in enumerate(decoder.layers):
            position = decoder.position_methods()[decoder.kinds[index].position]
            window = decoder.kinds[index].window
            stack.enter_context(_listening(layer.self_attn, index, position, window, record))
        yield


@contextmanager
def _listening(
    attention: Any, index: int, position: Position, window: int | None, record: Record
) -> Iterator[None]:
    variant: Any = attention.variant
    plain = variant.place

    def place(heads: Heads, rotation: Rotation) -> Heads:
        placed = plain(heads, rotation)
        keys = placed.k * (len(placed.q) // len(placed.k))
        record(
            Recorded(
                index,
                placed.q,
                keys,
                attention.scale,
                position.slopes(variant.sizes.heads),
                rotation.pairs if position.rotates else None,
                heads,
                variant.placement,
                window,
            )
        )
        return placed  # type: ignore[no-any-return]

    assert isinstance(variant, Variant)
    variant.place = place  # type: ignore[method-assign]
    try:
        yield
    finally:
        del variant.place


@contextmanager
def _theirs(model: PreTrainedModel, record: Record) -> Iterator[None]:
    AttentionInterface.register(NAME, _attend)
    # Without a mask function of the same name padding would be lost without a word.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(
            f"the attention of {type(model).__name__} does not go through Hugging Face's attention interface, "
            "so its queries and keys cannot be looked at"
        )
    token = _listener.set((record, _pairs_of(model)))
    try:
        yield
    finally:
        _listener.reset(token)
        model.set_attn_implementation(before)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """SDPA, after the streams were handed on. `options` are Hugging Face's."""
    heard = _listener.get()
    if heard is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        record, pairs = heard
        record(Recorded(int(module.layer_idx), (query,), (key,), scale, pairs=pairs))  # type: ignore[arg-type]
    return sdpa_attention_forward(  # type: ignore[no-any-return]
        module, query, key, value, attention_mask, scaling=scaling, **options
    )


def _pairs_of(model: PreTrainedModel) -> Pairs | None:
    """How the rotary embedding of a Hugging Face model pairs components, the turned ones being the first."""
    modules = rotary_modules(model)
    if not modules:
        return None
    width = 2 * int(modules[0][2].inv_freq.numel())
    interleaved = model.config.get_text_config().model_type in INTERLEAVED

    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        turned = x[..., :width]
        if interleaved:
            return turned[..., 0::2], turned[..., 1::2]
        first, second = turned.chunk(2, dim=-1)
        return first, second

    return pairs
