"""What a model costs, from its configuration alone.

Legend: H heads of one stream, G key-value heads, D key width, E value width, K key streams.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clearhead.models.config import ClearheadConfig
from clearhead.models.kinds import LayerKind
from clearhead.models.seq2seq_config import ClearheadSeq2SeqConfig
from clearhead.variants.base import Variant


@dataclass(frozen=True)
class WeightCounts:
    """Weights of a model, tied ones once, and of each layer of a decoder; () for models that are no single stack."""

    total: int
    layers: tuple[int, ...]


def weight_counts(
    config: ClearheadConfig | ClearheadSeq2SeqConfig, model_class: type[nn.Module] | None = None
) -> WeightCounts:
    """Builds the model without memory.

    model_class: what is built, by default the language model of the family.
    """
    from clearhead.models.tasks import task_of_config

    built = model_class or task_of_config(config).model_class
    with torch.device("meta"):
        model: Any = built(config)
    layers = getattr(model.base_model, "layers", None) or ()
    each = tuple(sum(weight.numel() for weight in layer.parameters()) for layer in layers)
    return WeightCounts(sum(weight.numel() for weight in model.parameters()), each)


def parameters(config: ClearheadConfig | ClearheadSeq2SeqConfig, model_class: Any = None) -> int:
    """Weights of the model, tied ones once: `weight_counts`."""
    return weight_counts(config, model_class).total


def forward_flops_per_token(config: ClearheadConfig | ClearheadSeq2SeqConfig, context: int) -> int:
    """Floating-point operations of a forward pass per token, averaged over the tokens of one row of `context` tokens.

    Two for every weight of a matrix product, 2·D + 2·E for every query head of every stream and visible key, and what
    the variant says of its own (`Variant.flops_per_token`: V2's λ projection); token i sees i + 1 keys, in an encoder
    all of the row, or its layer's window. An encoder's head for masked tokens is counted for every token, that of a
    classifier of texts once a row. Norms, rotations and activations are left out. This is the cost of the mechanism: a
    lowering that computes scores more than once (FlashDiffAttn_2) pays more. Training costs three times a forward pass.

    Of an encoder-decoder: a token that its encoder reads and one that its decoder writes, together, `context` tokens on
    both sides.
    """
    if isinstance(config, ClearheadSeq2SeqConfig):
        encoder, decoder = config.sides
        read = forward_flops_per_token(encoder, context) - _encoder_head(encoder)
        return round(read + forward_flops_per_token(decoder, context) + _cross_flops(config, context))
    assert config.intermediate_size is not None
    total = 2.0 * config.hidden_size * config.vocab_size
    if not config.causal:
        total = _text_head(config) / context if _is_text_classifier(config) else _encoder_head(config)
    for kind, variant in _by_layer(config):
        mean_keys = mean_visible(context, kind.window, config.causal)
        sizes = variant.sizes
        projections = config.hidden_size * (sizes.q + sizes.k + sizes.v + sizes.o)
        gated = 3 * config.hidden_size * config.intermediate_size
        scores = sum(sizes.query_heads) * (sizes.key_width + sizes.value_width) * mean_keys
        total += 2 * (projections + gated + scores) + variant.flops_per_token(mean_keys)
    return round(total)


def _encoder_head(config: ClearheadConfig) -> float:
    """FLOPs of the head for masked tokens, a token."""
    return 2.0 * config.hidden_size * (config.vocab_size + config.hidden_size)


def _text_head(config: ClearheadConfig) -> float:
    """FLOPs of the head for labels, a text."""
    return 2.0 * config.hidden_size * (config.hidden_size + (config.num_labels or 0))


def _is_text_classifier(config: ClearheadConfig) -> bool:
    return (config.architectures or [""])[0].endswith("ForSequenceClassification")


def _cross_flops(config: ClearheadSeq2SeqConfig, context: int) -> float:
    """FLOPs of cross-attention: queries and scores of a token that is written, keys and values of one that is read."""
    encoder, decoder = config.sides
    total = 0.0
    for layer in range(decoder.num_hidden_layers):
        with torch.device("meta"):
            variant = config.make_cross_variant(layer)
        sizes = variant.sizes
        written = decoder.hidden_size * (sizes.q + sizes.o) + encoder.hidden_size * (sizes.k + sizes.v)
        scores = sum(sizes.query_heads) * (sizes.key_width + sizes.value_width) * context
        total += 2 * (written + scores) + variant.flops_per_token(context)
    return total


def mean_visible(context: int, window: int | None, causal: bool = True) -> float:
    """Keys that a token sees, averaged over a row of `context` tokens: up to its own, or to both sides."""
    seen = context if window is None else min(window, context)
    behind = (seen * (seen + 1) / 2 + (context - seen) * seen) / context
    # Its own key is seen from neither side.
    return behind if causal else 2 * behind - 1


def kv_bytes_per_token(config: ClearheadConfig | ClearheadSeq2SeqConfig, dtype: torch.dtype) -> int:
    """Bytes that one token adds to the key-value cache: (K·D + E)·G numbers in every layer, K·D/2 in a compact one.

    In a layer with a sliding window only until it is full: see `kv_bytes`.
    """
    return kv_bytes(config, 1, dtype)


def kv_bytes(config: ClearheadConfig | ClearheadSeq2SeqConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes of a key-value cache of `context` tokens, one row; a layer with a window w keeps w − 1 of them at most.

    An encoder has no cache: 0. The decoder of an encoder-decoder also keeps keys and values of `context` source tokens.
    """
    if isinstance(config, ClearheadSeq2SeqConfig):
        own = kv_bytes(config.sides[1], context, dtype)
        for layer in range(config.sides[1].num_hidden_layers):
            with torch.device("meta"):
                cross = config.make_cross_variant(layer).sizes
            held = cross.kv_heads * (cross.key_streams * cross.key_width + cross.value_width)
            own += context * held * dtype.itemsize
        return own
    if not config.causal:
        return 0
    numbers = 0
    for kind, variant in _by_layer(config):
        sizes = variant.sizes
        keys = sizes.key_streams * sizes.key_width // (2 if config.compact_cache else 1)
        kept = context if kind.window is None else min(context, kind.window - 1)
        numbers += kept * sizes.kv_heads * (keys + sizes.value_width)
    return numbers * dtype.itemsize


def _by_layer(config: ClearheadConfig) -> list[tuple[LayerKind, Variant]]:
    """The kind of each layer and a variant of that kind, for its sizes: made once a kind, without memory."""
    made: dict[LayerKind, Variant] = {}
    kinds = config.layer_kinds
    for layer, kind in enumerate(kinds):
        if kind not in made:
            with torch.device("meta"):
                made[kind] = config.make_variant(layer)
    return [(kind, made[kind]) for kind in kinds]
