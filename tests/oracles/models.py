"""A whole decoder or encoder: embedding, pre-norm attention and SwiGLU (arXiv 2410.05258, equations 4, 5), head."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .layers import LayerSpec, layer
from .softmax import rms_norm


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(swish(x W_gate) ∘ x W_up) W_down."""
    g = torch.einsum("bli,oi->blo", x, gate)
    u = torch.einsum("bli,oi->blo", x, up)
    return torch.einsum("bli,oi->blo", g / (1 + torch.exp(-g)) * u, down)


def decoder(
    spec: LayerSpec,
    embedding: Tensor,
    blocks: list[dict[str, Tensor]],
    final_norm: Tensor,
    head: Tensor,
    tokens: Tensor,
    *,
    key_padding: Tensor | None = None,
    documents: Tensor | None = None,
    positions: Tensor | None = None,
    layer_positions: list[str] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, L, vocabulary) and each layer's effective map. A block is the layer's weights plus
    attention_norm, mlp_norm, gate, up and down; layer_positions names the position of each."""
    x, maps = stack(
        spec,
        blocks,
        embedding[tokens],
        layer_positions=layer_positions,
        causal=True,
        key_padding=key_padding,
        documents=documents,
        positions=positions,
    )
    return torch.einsum("bli,oi->blo", rms_norm(x, final_norm, spec.eps), head), maps


def stack(
    spec: LayerSpec,
    blocks: list[dict[str, Tensor]],
    x: Tensor,
    *,
    layer_positions: list[str] | None = None,
    windows: list[int | None] | None = None,
    **arguments: Any,
) -> tuple[Tensor, list[Tensor]]:
    """x (B, L, d_model) after every block, and each layer's effective map. A block without attention_norm has none."""
    maps = []
    for index, weights in enumerate(blocks):
        position = spec.position if layer_positions is None else layer_positions[index]
        y = x
        if "attention_norm" in weights:
            y = rms_norm(x, weights["attention_norm"], spec.eps)
        y, weights_map = layer(
            replace(spec, layer=index, position=position),
            weights,
            y,
            window=None if windows is None else windows[index],
            **arguments,
        )
        x = x + y
        x = x + swiglu(
            rms_norm(x, weights["mlp_norm"], spec.eps), weights["gate"], weights["up"], weights["down"]
        )
        maps.append(weights_map)
    return x, maps


def encoder(
    spec: LayerSpec,
    weights: dict[str, Tensor],
    blocks: list[dict[str, Tensor]],
    tokens: Tensor,
    **arguments: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states (B, L, d_model) and maps. weights: embedding, embedding_norm, final_norm; the rest: `stack`."""
    x = rms_norm(weights["embedding"][tokens], weights["embedding_norm"], spec.eps)
    x, maps = stack(spec, blocks, x, causal=False, **arguments)
    return rms_norm(x, weights["final_norm"], spec.eps), maps


def prediction_head(x: Tensor, dense: Tensor, norm: Tensor, eps: float) -> Tensor:
    """RMSNorm(gelu(W x)), with gelu(y) = y · (1 + erf(y/√2)) / 2."""
    y = torch.einsum("...i,oi->...o", x, dense)
    return rms_norm(y * (1 + torch.erf(y / math.sqrt(2))) / 2, norm, eps)
