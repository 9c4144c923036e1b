"""A whole encoder-decoder: two stacks of pre-norm blocks, the second with attention to the first (Vaswani et al. 2017).

The encoder's tokens see each other both ways; its embedding is normed, and its first attention is not once more, as in
ModernBERT. A block of the decoder is x + self-attention, + cross-attention, + SwiGLU,
each of the RMSNorm of what came before; cross-attention has queries and λ(x) of the decoder's tokens, keys and values
of the encoder's last states after their final norm. Where cross-attention has positions, a query stands at its place in
the target and a key at its place in the source.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layers import LayerSpec, layer
from .models import swiglu
from .softmax import rms_norm


@dataclass(frozen=True)
class Stack:
    """Weights of one side. A block holds those of its attention, attention_norm, mlp_norm, gate, up and down.

    crosses: for each block of a decoder the weights of its cross-attention and cross_norm.
    """

    spec: LayerSpec
    embedding: Tensor
    blocks: list[dict[str, Tensor]]
    final_norm: Tensor
    embed_norm: Tensor | None = None
    cross: LayerSpec | None = None
    crosses: list[dict[str, Tensor]] | None = None


def gated(spec: LayerSpec, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    y = rms_norm(x, weights["mlp_norm"], spec.eps)
    return x + swiglu(y, weights["gate"], weights["up"], weights["down"])


def encode(stack: Stack, tokens: Tensor, real: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """States (B, S, d_model) after the final norm, and each layer's map; positions count real tokens."""
    assert stack.embed_norm is not None
    x, maps = rms_norm(stack.embedding[tokens], stack.embed_norm, stack.spec.eps), []
    for index, weights in enumerate(stack.blocks):
        spec = replace(stack.spec, layer=index)
        normed = x if index == 0 else rms_norm(x, weights["attention_norm"], spec.eps)
        y, weights_map = layer(
            spec,
            weights,
            normed,
            key_padding=real,
            positions=counted(tokens, real),
        )
        x = gated(spec, weights, x + y)
        maps.append(weights_map)
    return rms_norm(x, stack.final_norm, stack.spec.eps), maps


def decode(
    stack: Stack,
    states: Tensor,
    tokens: Tensor,
    real: Tensor | None = None,
    source_real: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """States (B, L, d_model) after the final norm; maps of self- (B, H, L, L) and cross-attention (B, H, L, S)."""
    assert stack.cross is not None and stack.crosses is not None
    x, maps, cross_maps = stack.embedding[tokens], [], []
    here, there = counted(tokens, real), counted(states, source_real)
    for index, (weights, cross) in enumerate(zip(stack.blocks, stack.crosses, strict=True)):
        spec = replace(stack.spec, layer=index)
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
            replace(stack.cross, layer=index),
            cross,
            rms_norm(x, cross["cross_norm"], spec.eps),
            states,
            key_padding=source_real,
            positions=here,
            context_positions=there,
        )
        x = gated(spec, weights, x + y)
        maps.append(weights_map)
        cross_maps.append(cross_map)
    return rms_norm(x, stack.final_norm, stack.spec.eps), maps, cross_maps


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
