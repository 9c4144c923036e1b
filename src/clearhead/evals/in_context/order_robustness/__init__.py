"""Accuracy under other orders of the same examples."""
