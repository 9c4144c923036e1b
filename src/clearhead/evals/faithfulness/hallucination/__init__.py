"""Answers that a judge reads for what the source does not say."""
