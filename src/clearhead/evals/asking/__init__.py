"""Asking a model: texts, prompts, answers, losses and the log of samples."""
