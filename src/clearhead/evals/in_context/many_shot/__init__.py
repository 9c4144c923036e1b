"""Accuracy by the number of examples."""
