"""Attention layers for anyone's model."""

from clearhead.nn.attention import Attention
from clearhead.nn.named import (
    CollinearAttention,
    DifferentialAttention,
    DifferentialAttentionV2,
    DifferentialCollinearAttention,
    DifferentialCollinearAttentionV2,
)
from clearhead.nn.projections import AttentionCore, KeyValueCache

__all__ = [
    "Attention",
    "AttentionCore",
    "CollinearAttention",
    "DifferentialAttention",
    "DifferentialAttentionV2",
    "DifferentialCollinearAttention",
    "DifferentialCollinearAttentionV2",
    "KeyValueCache",
]
