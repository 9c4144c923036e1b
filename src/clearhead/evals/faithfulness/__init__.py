"""Evaluations of answers that keep to their document."""
