"""Evaluations of other programs."""
