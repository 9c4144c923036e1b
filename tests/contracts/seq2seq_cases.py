"""Small encoder-decoders of every variant, and the oracle of the same model."""

from typing import Any

import torch
from torch import Tensor

from clearhead.models import ClearheadForConditionalGeneration, ClearheadSeq2SeqConfig
from clearhead.variants.schedule import advance
from tests.contracts.model_cases import HEAD, LAYERS, VARIANTS, VOCABULARY, WIDTH, layout_of
from tests.oracles.layers import LayerSpec
from tests.oracles.seq2seq import Stack, decode, encode

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
Weights = dict[str, Tensor]


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
    # Of those with a schedule.
    advance(model, 3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "lambda_" in key and "proj" not in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def weights_of(model: ClearheadForConditionalGeneration) -> Weights:
    """A copy of its weights, each a leaf of its own that gradients come to."""
    return {
        key: value.detach().double().clone().requires_grad_(value.is_floating_point())
        for key, value in model.state_dict().items()
    }


def _attention(block: Weights, part: str) -> Weights:
    return {
        key.removeprefix(part).removeprefix("variant.").removesuffix(".weight"): value
        for key, value in block.items()
        if key.startswith(part)
    }


def _blocks(weights: Weights, side: str) -> list[Weights]:
    prefixes = [f"model.{side}.layers.{index}." for index in range(LAYERS)]
    return [
        {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        for prefix in prefixes
    ]


def _own(block: Weights) -> Weights:
    found = _attention(block, "self_attn.")
    found |= {name: block[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
    found["mlp_norm"] = block["post_attention_layernorm.weight"]
    if "input_layernorm.weight" in block:
        found["attention_norm"] = block["input_layernorm.weight"]
    return found


def seq2seq_oracle(
    name: str,
    layout: str,
    weights: Weights,
    source: Tensor,
    target: Tensor,
    *,
    cross_position: str = "nope",
    source_real: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, and the effective maps of encoder, decoder and cross-attention, of the oracle with these weights."""
    attention, options = VARIANTS[name]
    heads, kv_heads = layout_of(name, layout)
    (progress,) = {float(value) for key, value in weights.items() if key.endswith("progress")} or {1.0}
    spec = LayerSpec(attention, heads, kv_heads, HEAD, options={**options, "progress": progress})
    crossing = PARENTS.get(attention, attention) if cross_position == "nope" else attention
    cross = LayerSpec(crossing, heads, kv_heads, HEAD, position=cross_position, options=spec.options)
    sides = {
        side: Stack(
            spec,
            weights[f"model.{side}.embed_tokens.weight"],
            [_own(block) for block in _blocks(weights, side)],
            weights[f"model.{side}.norm.weight"],
            weights.get(f"model.{side}.embed_norm.weight"),
            cross if side == "decoder" else None,
            [
                _attention(block, "cross_attn.") | {"cross_norm": block["cross_attention_layernorm.weight"]}
                for block in _blocks(weights, side)
            ]
            if side == "decoder"
            else None,
        )
        for side in ("encoder", "decoder")
    }
    states, encoder_maps = encode(sides["encoder"], source, source_real)
    last, maps, cross_maps = decode(sides["decoder"], states, target, real, source_real)
    logits = torch.einsum("blc,vc->blv", last, weights["lm_head.weight"])
    return logits, encoder_maps, maps, cross_maps
