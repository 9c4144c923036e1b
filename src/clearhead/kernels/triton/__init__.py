"""The fused kernels for GPUs, in Triton. `triton` itself is imported when the first of them runs."""
