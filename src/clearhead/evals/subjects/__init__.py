"""Opening what is evaluated: models from elsewhere, GGUF files, adapters."""
