"""Figures of charts, a kind a file, and the frame that all kinds share."""
