"""How large the weights of a model that is trained from nothing start."""

import math
from collections.abc import Mapping
from typing import Any

from clearhead.models.config import ClearheadConfig


def standard_deviation(width: int) -> float:
    """sqrt(2 / (5 · width)): of all matrices, for every variant alike, where a recipe does not say otherwise.

    Nguyen and Salazar, "Transformers without Tears" (arXiv:1910.05895), section 2.2. It is 0.079 at a width of 64,
    0.028 at 512 and the usual 0.02 at 1000; a narrow model that starts at 0.02 spends a good part of a short training
    on leaving the start. `ClearheadConfig` itself keeps Hugging Face's 0.02.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, not {width}")
    return math.sqrt(2.0 / (5.0 * width))


# Of an untied token embedding. By the rule above a layer whose heads are normed adds numbers of about this size to each
# token from the first step on, whatever the width; a smaller embedding drowns in them.
EMBEDDING_STANDARD_DEVIATION = 0.5


def with_defaults(
    model: Mapping[str, Any], length: int, config: type[ClearheadConfig] = ClearheadConfig
) -> dict[str, Any]:
    """A recipe's keys of `config` with what it leaves out: the trained length, and the start by the width."""
    width = model.get("hidden_size", config.hidden_size)
    # Scalings count from the trained length.
    chosen = {"max_position_embeddings": length, "initializer_range": standard_deviation(width)}
    if not model.get("tie_word_embeddings", config.tie_word_embeddings):
        chosen["embedding_initializer_range"] = EMBEDDING_STANDARD_DEVIATION
    return {**chosen, **model}
