"""Clearhead's kernels in other people's models."""

from clearhead.extras import need

need("clearhead.integrations", "hf")
