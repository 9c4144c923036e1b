"""Judges of the evaluation `hallucination`: one file each, chosen by name (`registry.JUDGES`)."""
