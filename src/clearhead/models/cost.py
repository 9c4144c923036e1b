"""What a model costs, from its configuration alone.

Legend: H heads of one stream, G key-value heads, D key width, E value width, K key streams.
"""

import torch

from clearhead.models.config import ClearheadConfig
from clearhead.variants.base import Variant


def parameters(config: ClearheadConfig) -> int:
    """Weights of the language model, tied ones once. Builds it without memory."""
    from clearhead.models.causal import ClearheadForCausalLM

    with torch.device("meta"):
        model = ClearheadForCausalLM(config)
    return sum(weight.numel() for weight in model.parameters())


def forward_flops_per_token(config: ClearheadConfig, context: int) -> int:
    """Floating-point operations of a forward pass per token, averaged over the tokens of one row of `context` tokens.

    Two for every weight of a matrix product, 2·D + 2·E for every query head of every stream and visible key, and what
    the variant says of its own (`Variant.flops_per_token`: V2's λ projection); token i sees i + 1 keys. Norms,
    rotations and activations are left out. This is the cost of the mechanism: a lowering that computes scores more than
    once (FlashDiffAttn_2) pays more. Training costs three times a forward pass.
    """
    assert config.intermediate_size is not None
    mean_keys = (context + 1) / 2
    total = 2.0 * config.hidden_size * config.vocab_size
    for layer in range(config.num_hidden_layers):
        variant = _variant(config, layer)
        sizes = variant.sizes
        projections = config.hidden_size * (sizes.q + sizes.k + sizes.v + sizes.o)
        gated = 3 * config.hidden_size * config.intermediate_size
        scores = sum(sizes.query_heads) * (sizes.key_width + sizes.value_width) * mean_keys
        total += 2 * (projections + gated + scores) + variant.flops_per_token(mean_keys)
    return round(total)


def kv_bytes_per_token(config: ClearheadConfig, dtype: torch.dtype) -> int:
    """Bytes that one token adds to the key-value cache: (K·D + E)·G numbers in every layer, K·D/2 in a compact one."""
    numbers = 0
    for layer in range(config.num_hidden_layers):
        sizes = _variant(config, layer).sizes
        keys = sizes.key_streams * sizes.key_width // (2 if config.compact_cache else 1)
        numbers += sizes.kv_heads * (keys + sizes.value_width)
    return numbers * dtype.itemsize


def _variant(config: ClearheadConfig, layer: int) -> Variant:
    """For its sizes: without memory."""
    with torch.device("meta"):
        return config.make_variant(layer)
