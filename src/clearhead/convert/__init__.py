"""Checkpoints of other projects to this library's and back: one source format a file, exact, checked on text."""

from clearhead.extras import need

need("clearhead.convert", "hf")
