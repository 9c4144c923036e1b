"""A whole decoder: embedding, pre-norm attention and SwiGLU (arXiv 2410.05258, equations 4 and 5), head."""

from dataclasses import replace

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
    x = embedding[tokens]
    maps = []
    for index, weights in enumerate(blocks):
        y, weights_map = layer(
            replace(
                spec,
                layer=index,
                position=spec.position if layer_positions is None else layer_positions[index],
            ),
            weights,
            rms_norm(x, weights["attention_norm"], spec.eps),
            causal=True,
            key_padding=key_padding,
            documents=documents,
            positions=positions,
        )
        x = x + y
        x = x + swiglu(
            rms_norm(x, weights["mlp_norm"], spec.eps), weights["gate"], weights["up"], weights["down"]
        )
        maps.append(weights_map)
    return torch.einsum("bli,oi->blo", rms_norm(x, final_norm, spec.eps), head), maps
