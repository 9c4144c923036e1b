"""Evaluations made of others; they may import any wing."""
