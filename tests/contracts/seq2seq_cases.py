"""Small encoder-decoders of every variant, and the oracle of the same model."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clearhead.models import ClearheadForConditionalGeneration, ClearheadSeq2SeqConfig
from tests.contracts.model_cases import (
    HEAD,
    LAYERS,
    VARIANTS,
    VOCABULARY,
    WIDTH,
    blocks_of,
    layout_of,
    shake,
    spec_of,
)
from tests.oracles.models import encoder
from tests.oracles.seq2seq import Target, counted, decode

SOURCE_WIDTH = 20
# Between the two sequences: every variant without positions in the form that it then has, and all of them turned.
CASES = [(name, position) for name in VARIANTS for position in ("nope", "rope")]
START, PAD = 1, 0
# What a collinear variant is where nothing is turned.
PARENTS = {
    "collinear": "softmax",
    "differential_collinear": "differential",
    "differential_v2_collinear": "differential_v2",
}


def make_seq2seq_config(name: str, layout: str = "gqa", **changes: Any) -> ClearheadSeq2SeqConfig:
    attention, options = VARIANTS[name]
    heads, kv_heads = layout_of(name, layout)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD,
        "attention": attention,
        "attention_options": options,
        "initializer_range": 0.25,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "encoder": {"hidden_size": SOURCE_WIDTH},
        "decoder": {"hidden_size": WIDTH},
    }
    return ClearheadSeq2SeqConfig(**(settings | changes))


def make_seq2seq(
    name: str, layout: str = "gqa", dtype: torch.dtype = torch.float32, **changes: Any
) -> ClearheadForConditionalGeneration:
    torch.manual_seed(11)
    model = ClearheadForConditionalGeneration(make_seq2seq_config(name, layout, **changes)).to(dtype).eval()
    shake(model)
    return model


def crosses_of(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The decoder layers' cross-attention under the oracle's names."""
    found = []
    for index in range(LAYERS):
        layer = f"model.decoder.layers.{index}."
        prefix = f"{layer}cross_attn."
        own = {
            key.removeprefix(prefix).removeprefix("variant.").removesuffix(".weight"): value
            for key, value in weights.items()
            if key.startswith(prefix)
        }
        found.append(own | {"cross_norm": weights[f"{layer}cross_attention_layernorm.weight"]})
    return found


def seq2seq_oracle(
    name: str,
    layout: str,
    weights: dict[str, Tensor],
    source: Tensor,
    target: Tensor,
    *,
    cross_position: str = "nope",
    source_real: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, and the effective maps of encoder, decoder and cross-attention, of the oracle with these weights."""
    spec = spec_of(name, layout, weights)
    parent = PARENTS.get(spec.attention, spec.attention)
    cross = replace(
        spec, attention=parent if cross_position == "nope" else spec.attention, position=cross_position
    )
    states, encoder_maps = encoder(
        spec,
        {
            "embedding": weights["model.encoder.embed_tokens.weight"],
            "embedding_norm": weights["model.encoder.embed_norm.weight"],
            "final_norm": weights["model.encoder.norm.weight"],
        },
        blocks_of(weights, LAYERS, "model.encoder"),
        source,
        key_padding=source_real,
        positions=counted(source, source_real),
    )
    decoder = Target(
        spec,
        weights["model.decoder.embed_tokens.weight"],
        blocks_of(weights, LAYERS, "model.decoder"),
        weights["model.decoder.norm.weight"],
        cross,
        crosses_of(weights),
    )
    last, maps, cross_maps = decode(decoder, states, target, real, source_real)
    return torch.einsum("blc,vc->blv", last, weights["lm_head.weight"]), encoder_maps, maps, cross_maps
