"""Rope scalings to and from configurations of transformers."""

from collections.abc import Mapping
from typing import Any, Protocol

from clearhead.positions.rope import read_rope_parameters
from clearhead.positions.scaling.longrope import LongRopeScaling
from clearhead.positions.scaling.ntk import NtkScaling
from clearhead.positions.scaling.yarn import YarnScaling

# The scalings that both have under one name.
SHARED = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
# Model types of transformers that pair components (2j, 2j + 1); most pair (j, j + D/2).
INTERLEAVED = (
    "cohere",
    "cohere2",
    "ernie4_5",
    "ernie4_5_moe",
    "glm",
    "glm4",
    "helium",
    "llama4_text",
)


class Configuration(Protocol):
    """What is read of a configuration; those of transformers have it."""

    model_type: str

    def to_dict(self) -> dict[str, Any]:
        """All keys and values."""
        ...


def from_transformers(config: Configuration, layer_type: str | None = None) -> dict[str, Any]:
    """This library's `rope_parameters` for a model of transformers (from 5.0 on, with `config.rope_parameters`).

    layer_type: which of the sets that some models have by kind of layer, for example "full_attention".

    The result says everything itself: lengths and factors that transformers takes from other keys of the configuration
    are written down, and so is the layout. `max_position_embeddings` of the new configuration is then free.
    ValueError for what this library does not have: partial rotary embedding, other rope types.
    """
    sizes = config.to_dict()
    found = sizes.get("rope_parameters")
    if not found:
        raise ValueError(f"a {config.model_type!r} configuration has no rope_parameters")
    nested = [key for key, value in found.items() if isinstance(value, Mapping)]
    if nested:
        if layer_type not in nested:
            raise ValueError(
                f"a {config.model_type!r} configuration has rope_parameters for each of {', '.join(nested)}: give one "
                f"of them as layer_type, not {layer_type!r}"
            )
        found = found[layer_type]
    elif layer_type is not None:
        raise ValueError(f"a {config.model_type!r} configuration has no rope_parameters by layer_type")
    # `type` is the name that `rope_type` had before.
    parameters = {key: value for key, value in found.items() if value is not None and key != "type"}
    kind = parameters.setdefault("rope_type", found.get("type", "default"))
    if kind not in SHARED:
        raise ValueError(f"rope_type {kind!r} of transformers is not one of {', '.join(SHARED)}")
    if (part := parameters.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(
            f"partial_rotary_factor must be 1: heads are turned as a whole here, not {part:g} of them"
        )
    width = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    positions = sizes["max_position_embeddings"]
    if kind == "dynamic":
        parameters["original_max_position_embeddings"] = positions
    if config.model_type in INTERLEAVED or sizes.get("rope_interleave"):
        parameters["layout"] = "interleaved"
    scaling, _ = read_rope_parameters(width, parameters, positions)
    if isinstance(scaling, YarnScaling | LongRopeScaling):
        parameters |= {
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.trained_length,
        }
    return parameters


def to_transformers(
    parameters: Mapping[str, Any], head_dim: int, max_positions: int | None
) -> dict[str, Any]:
    """`rope_parameters` of this library as transformers' models take them.

    max_positions: `max_position_embeddings` of the model that they are for.

    "ntk" becomes "default" with the scaled base. ValueError for what transformers cannot say: a layout other than
    "half", a scaling of a third party, and "dynamic" with a trained length other than `max_positions`, which is the
    only one that transformers looks at.
    """
    scaling, layout = read_rope_parameters(head_dim, parameters, max_positions)
    if layout != "half":
        raise ValueError(
            f"rope_parameters of transformers cannot say layout {layout!r}: permute the query and key projections to "
            '"half" first'
        )
    kind = parameters.get("rope_type", "default")
    if isinstance(scaling, NtkScaling):
        return {"rope_type": "default", "rope_theta": scaling.scaled_theta}
    if kind not in SHARED:
        raise ValueError(f"transformers has no rope_type {kind!r}")
    given = {key: value for key, value in parameters.items() if key != "layout" and value is not None}
    made = {**given, "rope_type": kind, "rope_theta": scaling.theta}
    if kind == "dynamic":
        if scaling.trained_length != max_positions:
            raise ValueError(
                "rope_type 'dynamic' of transformers counts from max_position_embeddings: give that model "
                f"max_position_embeddings={scaling.trained_length}, not {max_positions}"
            )
        made.pop("original_max_position_embeddings", None)
    elif scaling.trained_length is not None:
        made["original_max_position_embeddings"] = scaling.trained_length
    if isinstance(scaling, YarnScaling | LongRopeScaling):
        made["factor"] = scaling.factor
    return made
