"""Scaling laws: fits, their intervals, equivalence ratios between arms, and refusals with their reasons."""
