"""Variants: programs over softmax attention, one mechanism a file."""
