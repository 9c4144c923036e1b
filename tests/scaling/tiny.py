"""A grid small enough for a test."""

from typing import Any


def raw_recipe(corpus: str, **changes: Any) -> dict[str, Any]:
    """The tables of a recipe with two sizes, two budgets and two arms; `changes` replace whole tables."""
    return {
        "name": "tiny",
        "corpus": {"source": corpus, "validation_fraction": 0.2},
        "tokenizer": {"vocab_size": 300},
        "data": {"length": 32},
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "train": {
            "batch_tokens": 64,
            "learning_rate": 4e-3,
            "schedule": "wsd",
            "warmup": 0.2,
            "save_every": 7,
            "log_every": 4,
        },
        "evaluate": {"suites": ["language_modelling"]},
        "scaling": {"widths": [16, 32], "budgets": [1280, 2560]},
        "arms": [{"name": "Transformer"}, {"name": "DIFF V1", "attention": "differential"}],
        **changes,
    }
