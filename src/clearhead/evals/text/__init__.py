"""Evaluations of plain text: losses and perplexity."""
