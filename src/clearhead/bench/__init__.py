"""Measured speed and memory: cases as data, peers interleaved in one process, a correctness gate before any time."""

from clearhead.extras import need

need("clearhead.bench", "report")
