"""Fused kernels: faster ways to run a whole variant behind the same interface. They never change the maths."""
