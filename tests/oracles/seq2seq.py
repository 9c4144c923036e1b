"""The decoder of an encoder-decoder: pre-norm blocks with attention to the encoder's states (Vaswani et al. 2017).

A block is x + self-attention, + cross-attention, + SwiGLU, each of the RMSNorm of what came before; cross-attention has
queries and λ(x) of the decoder's tokens, keys and values of the encoder's last states after their final norm
(`models.encoder`). Where cross-attention has positions, a query stands at its place in the target, a key at its own in
the source.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layers import LayerSpec, layer
from .models import swiglu
from .softmax import rms_norm


@dataclass(frozen=True)
class Target:
    """A decoder that attends to an encoder. A block holds the weights of its attention, attention_norm, mlp_norm, gate,
    up and down; one of `crosses` those of its cross-attention and cross_norm.
    """

    spec: LayerSpec
    embedding: Tensor
    blocks: list[dict[str, Tensor]]
    final_norm: Tensor
    cross: LayerSpec
    crosses: list[dict[str, Tensor]]


def decode(
    side: Target,
    states: Tensor,
    tokens: Tensor,
    real: Tensor | None = None,
    source_real: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """States (B, L, d_model) after the final norm; maps of self- (B, H, L, L) and cross-attention (B, H, L, S)."""
    x, maps, cross_maps = side.embedding[tokens], [], []
    here, there = counted(tokens, real), counted(states, source_real)
    for index, (weights, cross) in enumerate(zip(side.blocks, side.crosses, strict=True)):
        spec = replace(side.spec, layer=index)
        y, weights_map = layer(
            spec,
            weights,
            rms_norm(x, weights["attention_norm"], spec.eps),
            causal=True,
            key_padding=real,
            positions=here,
        )
        x = x + y
        y, cross_map = layer(
            replace(side.cross, layer=index),
            cross,
            rms_norm(x, cross["cross_norm"], spec.eps),
            states,
            key_padding=source_real,
            positions=here,
            context_positions=there,
        )
        x = x + y
        y = rms_norm(x, weights["mlp_norm"], spec.eps)
        x = x + swiglu(y, weights["gate"], weights["up"], weights["down"])
        maps.append(weights_map)
        cross_maps.append(cross_map)
    return rms_norm(x, side.final_norm, side.spec.eps), maps, cross_maps


def counted(rows: Tensor, real: Tensor | None) -> Tensor:
    """(B, N) places of the tokens of each row, padding left out of the count."""
    positions = torch.zeros(rows.shape[:2], dtype=torch.long)
    for b in range(rows.shape[0]):
        seen = 0
        for i in range(rows.shape[1]):
            positions[b, i] = max(seen - (0 if real is None or bool(real[b, i]) else 1), 0)
            seen += 1 if real is None or bool(real[b, i]) else 0
    return positions


def shifted(labels: Tensor, start: int, pad: int) -> Tensor:
    """What the decoder reads to say `labels`: the start token, then each label but the last; −100 becomes padding."""
    rows = []
    for row in labels.tolist():
        rows.append([start, *(pad if label == -100 else label for label in row[:-1])])
    return torch.tensor(rows)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of −log softmax(logits)[label] over the labels that are not −100, in nats."""
    total, count = torch.zeros((), dtype=logits.dtype), 0
    for b in range(labels.shape[0]):
        for i in range(labels.shape[1]):
            if labels[b, i] != -100:
                row = logits[b, i]
                top = row.max().detach()
                total = total + torch.log(torch.exp(row - top).sum()) + top - row[labels[b, i]]
                count += 1
    return total / count
