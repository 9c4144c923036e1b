"""Engines: ways to run softmax attention calls. Capabilities are data; the lowering in `core` does the rewriting."""
