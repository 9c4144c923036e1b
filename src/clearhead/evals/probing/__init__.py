"""Looking into a model: its attention, its logits, its rotary scaling, its rounding."""
