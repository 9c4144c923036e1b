"""Evaluations of learning from examples in the prompt."""
