"""Engines: ways to run softmax attention calls. Capabilities are data; the legaliser in `core` does the rewriting."""
