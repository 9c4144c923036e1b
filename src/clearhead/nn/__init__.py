"""Attention layers for anyone's model."""

from clearhead.nn.attention import Attention
from clearhead.nn.named import (
    CollinearAttention,
    DifferentialAttention,
    DifferentialAttentionV2,
    DifferentialCollinearAttention,
    DifferentialCollinearAttentionV2,
)
from clearhead.nn.projections import KeyValueCache, ProjectedAttention

__all__ = [
    "Attention",
    "CollinearAttention",
    "DifferentialAttention",
    "DifferentialAttentionV2",
    "DifferentialCollinearAttention",
    "DifferentialCollinearAttentionV2",
    "KeyValueCache",
    "ProjectedAttention",
]
