"""Clearhead's kernels in other people's models."""
