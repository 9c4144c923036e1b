"""Numbers of a model's layers that are worth a line in a log."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clearhead.models.blocks import ClearheadLayer


@torch.no_grad()
def diagnostics_of(
    layers: Sequence[ClearheadLayer], states: Callable[[], Sequence[Tensor]] | None
) -> dict[str, dict[int, float]]:
    """What each layer's variant says (`Variant.diagnostics`), by name, then by layer.

    states: computes the input (B, L, hidden_size) of every layer, called if a variant needs it; None if there is none.
    """
    needed = states is not None and any(layer.self_attn.variant.diagnostics_need_input for layer in layers)
    hidden = states() if needed and states is not None else None
    found: dict[str, dict[int, float]] = {}
    for index, layer in enumerate(layers):
        with whole(layer):
            seen = None if hidden is None else layer.input_layernorm(hidden[index])
            for name, value in layer.self_attn.variant.diagnostics(seen).items():
                found.setdefault(name, {})[index] = value
    return found


@contextmanager
def whole(module: Any) -> Iterator[None]:
    """With all weights of a module's own group here, where FSDP2 has shared them out; every process does this."""
    sharded = hasattr(module, "unshard")
    if sharded:
        module.unshard()
    try:
        yield
    finally:
        if sharded:
            module.reshard()
