"""What a model's variants have for a log (`Variant.diagnostics`), as the journal and TensorBoard take it."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from clearhead.models.diagnostics import diagnostics_of, whole

ByLayer = dict[str, dict[str, float]]


def measure(model: Any, tokens: Tensor) -> ByLayer:
    """Each diagnostic of a model by its name, then by layer."""
    # Embeddings are read outside the whole model's forward pass, which would gather them.
    with whole(model):
        found = _found(model, tokens)
    return {
        name: {str(layer): round(value, 6) for layer, value in values.items()}
        for name, values in found.items()
    }


def _found(model: Any, tokens: Tensor) -> dict[str, dict[int, float]]:
    if hasattr(model, "diagnostics"):
        found: dict[str, dict[int, float]] = model.diagnostics(tokens)
        return found
    if model.config.is_encoder_decoder:
        return _of_both_sides(model.base_model, tokens)
    stack = model.base_model

    def states() -> Any:
        return stack(input_ids=tokens, output_hidden_states=True).hidden_states

    return diagnostics_of(stack.own_layers(), states)


def _of_both_sides(model: Any, tokens: Tensor) -> dict[str, dict[int, float]]:
    """Self-attention of an encoder-decoder that reads `tokens` on both sides; the decoder's layers are counted on."""
    seen = cache(
        lambda: model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False, output_hidden_states=True)
    )
    found = diagnostics_of(model.encoder.own_layers(), lambda: seen().encoder_hidden_states)
    layers = len(model.encoder.own_layers())
    for name, values in diagnostics_of(
        model.decoder.own_layers(), lambda: seen().decoder_hidden_states
    ).items():
        found.setdefault(name, {}).update({layers + layer: value for layer, value in values.items()})
    return found


def as_record(found: ByLayer) -> dict[str, Any]:
    """For a record of `metrics.jsonl`: λ under its own key, as in every earlier run, the others under "diagnostics"."""
    others = {name: values for name, values in found.items() if name != "lambda"}
    return {"lambda": found.get("lambda", {}), **({"diagnostics": others} if others else {})}


def as_scalars(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """For TensorBoard: one curve a layer."""
    return {
        f"{name}/layer_{layer}": value for name, values in found.items() for layer, value in values.items()
    }


def writer(folder: Path, resumed_step: int) -> Any:
    """TensorBoard's writer, without what was logged after the step that is gone on from."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resumed_step if folder.exists() else None)
