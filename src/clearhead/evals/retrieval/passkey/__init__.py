"""Passkey retrieval by length."""
