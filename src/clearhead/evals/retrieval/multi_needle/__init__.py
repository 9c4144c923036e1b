"""Several needles in natural language."""
