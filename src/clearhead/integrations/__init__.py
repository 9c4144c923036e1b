"""Clearhead's kernels in other people's models."""

from clearhead.extras import need

need("clearhead.integrations", "hf")

from clearhead.integrations.hf_attention import use_fused

__all__ = ["use_fused"]
