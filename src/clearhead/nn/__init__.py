"""Attention layers for anyone's model."""

from clearhead.nn.attention import Attention
from clearhead.nn.core import AttentionCore, KeyValueCache
from clearhead.nn.layers import (
    CollinearAttention,
    DifferentialAttention,
    DifferentialAttentionV2,
    DifferentialCollinearAttention,
    DifferentialCollinearAttentionV2,
)

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
