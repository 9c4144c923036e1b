"""Evaluations of what happens inside: attention, activations, angles, rounding."""
