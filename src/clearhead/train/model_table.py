"""What the keys of [model] and of an arm's attention_options may be: types without conversion, and ranges."""

import inspect
import math
from collections.abc import Mapping
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Width = Annotated[int, Field(ge=1, le=2**20)]
Heads = Annotated[int, Field(ge=1, le=2**14)]
Deviation = Annotated[float, Field(ge=0, le=1e3)]

# Options of attention variants by name: their lowest and highest value.
OPTION_RANGES = {"norm_eps": (0.0, 1.0), "lambda_std": (0.0, 1e3), "lambda_init": (0.0, 1.0)}


class ModelTable(BaseModel):
    """The keys of the configurations that a recipe may set; what fits together they check themselves."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    hidden_size: Width = 512
    intermediate_size: Annotated[int, Field(ge=1, le=2**24)] | None = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)] = 8
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads | None = None
    head_dim: Annotated[int, Field(ge=1, le=2**14)] | None = None
    position: str = "rope"
    rope_parameters: dict[str, Any] | None = None
    layer_positions: list[str] | None = None
    nope_interval: Annotated[int, Field(ge=2, le=10_000)] | None = None
    sliding_window: Annotated[int, Field(ge=2, le=2**40)] | None = None
    layers: list[dict[str, Any]] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**40)] = 2048
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    initializer_range: Deviation = 0.02
    embedding_initializer_range: Deviation | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    compact_cache: bool = False
    block_sparse: dict[str, Any] | None = None
    # Of encoders.
    classifier_pooling: str = "mean"
    classifier_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Of encoder-decoders.
    encoder: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    cross_attention: str | None = None
    cross_attention_options: dict[str, Any] | None = None
    cross_position: str = "nope"


def model_fault(table: Mapping[str, Any]) -> str | None:
    """The first thing wrong with the values of a model table, in a clause that names the key; None when all is well."""
    try:
        ModelTable.model_validate(dict(table))
    except ValidationError as error:
        detail = error.errors()[0]
        return _clause(f"model.{detail['loc'][0]}", detail["msg"], detail["input"])
    return _not_finite("model.rope_parameters", table.get("rope_parameters"))


def option_fault(variant: Any, options: Mapping[str, Any]) -> str | None:
    """The same for the options of an attention variant, by the annotations of its constructor and `OPTION_RANGES`."""
    hints = get_type_hints(variant.__init__)
    for name, value in options.items():
        if name not in inspect.signature(variant).parameters or name not in hints:
            continue
        try:
            TypeAdapter(hints[name], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            return _clause(f"attention_options.{name}", error.errors()[0]["msg"], value)
        if (found := _not_finite(f"attention_options.{name}", value)) is not None:
            return found
        low, high = OPTION_RANGES.get(name, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:
            return f"attention_options.{name} must be in {low:g} to {high:g}, got {value!r}"
    return None


def _clause(key: str, message: str, value: Any) -> str:
    return f"{key}: {message[0].lower()}{message[1:]}, got {value!r}"


def _not_finite(key: str, value: Any) -> str | None:
    """The first number below `value` that is not finite, or no number that a float can be."""
    if isinstance(value, Mapping):
        parts = [_not_finite(f"{key}.{name}", part) for name, part in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [_not_finite(f"{key}.{index}", part) for index, part in enumerate(value)]
    elif isinstance(value, (int, float)) and not (
        math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63
    ):
        return f"{key} must be a finite number, got {value!r}"
    else:
        return None
    return next((part for part in parts if part is not None), None)
