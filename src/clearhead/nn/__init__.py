"""Attention layers for anyone's model."""

from clearhead.nn.attention import Attention
from clearhead.nn.named import (
    CollinearAttention,
    DexAttention,
    DifferentialAttention,
    DifferentialAttentionV2,
    DifferentialCollinearAttention,
    DifferentialCollinearAttentionV2,
    DiffLoraAttention,
)
from clearhead.nn.projections import KeyValueCache, ProjectedAttention

__all__ = [
    "Attention",
    "CollinearAttention",
    "DexAttention",
    "DiffLoraAttention",
    "DifferentialAttention",
    "DifferentialAttentionV2",
    "DifferentialCollinearAttention",
    "DifferentialCollinearAttentionV2",
    "KeyValueCache",
    "ProjectedAttention",
]
