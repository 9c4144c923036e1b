"""Checkpoints of other projects to this library's and back: one source format a file, exact, checked on text."""
