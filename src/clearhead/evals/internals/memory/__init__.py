"""Quality against the bytes of a key-value cache."""
