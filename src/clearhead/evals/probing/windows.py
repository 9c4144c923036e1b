"""How far back each layer of a model sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def windows(model: PreTrainedModel) -> list[int | None]:
    """For each layer the tokens that a query sees, its own among them; None for all.

    Of this library's models and of any whose configuration has `sliding_window`, for all layers or for those that
    `layer_types` names.
    """
    kinds = getattr(model.config, "layer_kinds", None)
    if kinds is not None:
        return [kind.window for kind in kinds]
    config = model.config.get_text_config()
    count = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return [None] * count
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    return [int(window) if kind == "sliding_attention" else None for kind in types]
