"""Real text in, token batches out."""
