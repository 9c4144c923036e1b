"""The same weights under another rotary scaling, or under one whose length is settled.

What a rotary scaling does is a matter of frequencies, not of weights, so a trained model can be looked at under any of
them. Length-dependent scalings (dynamic NTK, LongRoPE) are measured at one length a request: models of this library
take it from each call; those of Hugging Face keep it between calls instead (after a long text a shorter one is read
with the long one's frequencies, and keys in a cache keep those of the step they were written at), so here their
frequencies are computed once for the length that is measured, and put back afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clearhead.positions.interchange import to_transformers
from clearhead.registry import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROWING = ("dynamic", "longrope")
"""Scalings of Hugging Face that depend on the length of the text."""
KEPT = ("rope_theta", "layout")
"""Keys of `rope_parameters` that every scaling of a model shares."""
PARTIAL = "partial_rotary_factor"
ORIGINAL = "original_max_position_embeddings"


def grows(model: PreTrainedModel) -> bool:
    """Whether a model of this library has a rotary scaling, its own or a tried one, that looks at the length."""
    if model.config.to_dict().get("model_type") != "clearhead":
        return False
    methods: Mapping[str, Any] = model.position_methods()  # type: ignore[operator]
    return any(method.depends_on_length for method in methods.values())


def growing(model: PreTrainedModel, tried: Mapping[str, Any] | None = None) -> bool:
    """Whether rotary frequencies depend on the length of a text, under the scaling `tried` or the model's own.

    Then only texts of one length are read together, each batch settled for it: padding would count as text.
    """
    if tried is not None:
        return tried.get("rope_type") in GROWING
    parameters = model.config.to_dict().get("rope_parameters") or {}
    # One scaling, or one for each type of layer.
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return grows(model) or any(part.get("rope_type") in GROWING for part in kinds)


@contextmanager
def rescaled(
    model: PreTrainedModel,
    parameters: Mapping[str, Any] | None = None,
    *,
    trained: int | None = None,
    length: int | None = None,
) -> Iterator[None]:
    """Inside, `model` has the rotary scaling `parameters`; its own comes back afterwards.

    parameters: as in `config.rope_parameters`, `{"rope_type": "dynamic", "factor": 4.0}`, of any scaling of this
        library; the base and the pairing stay the model's unless they are named. None keeps the model's own.
    trained: the training length, from which a scaling counts that is not told `original_max_position_embeddings`.
    length: tokens of a request, generated ones included, for which a length-dependent scaling of a Hugging Face model
        is settled. Models of this library are told by each call.
    Raises ValueError for parameters that are wrong and for a model without rotary positions.
    """
    ours = model.config.to_dict().get("model_type") == "clearhead"
    with _own(model, parameters, trained) if ours else _theirs(model, parameters, trained, length):
        yield


@contextmanager
def _own(model: Any, parameters: Mapping[str, Any] | None, trained: int | None) -> Iterator[None]:
    """`model` is a ClearheadForCausalLM."""
    if parameters is None:
        yield
        return
    decoder, config = model.model, copy.deepcopy(model.config)
    before = decoder.positions
    if not any(method.rotates for method in decoder.position_methods().values()):
        names = ", ".join(before)
        raise ValueError(
            f"the model has no rotary positions but {names!r}, so no rotary scaling can be tried on it"
        )
    config.rope_parameters = _over(config.rope_parameters or {}, parameters, trained)
    decoder.positions = nn.ModuleDict(config.make_positions()).to(model.device, model.dtype)
    try:
        yield
    finally:
        decoder.positions = before


@contextmanager
def _theirs(
    model: PreTrainedModel, parameters: Mapping[str, Any] | None, trained: int | None, length: int | None
) -> Iterator[None]:
    found = rotary_modules(model)
    if not found and parameters is not None:
        raise ValueError(
            f"{type(model).__name__} has no rotary position embedding, or not one for all layers, "
            "so no rotary scaling can be tried on it"
        )
    made = [(parent, name, _embedding(module, parameters, trained, length)) for parent, name, module in found]
    try:
        for parent, name, module in made:
            setattr(parent, name, module)
        yield
    finally:
        for parent, name, module in found:
            setattr(parent, name, module)


def rotary_modules(model: PreTrainedModel) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, module) of every rotary embedding of a Hugging Face model, known by its frequencies."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if "inv_freq" in dict(child.named_buffers(recurse=False))
    ]


def _embedding(
    module: Any, parameters: Mapping[str, Any] | None, trained: int | None, length: int | None
) -> nn.Module:
    """The rotary embedding itself if there is nothing to do, else one of its kind, its length settled."""
    own = dict(module.config.rope_parameters)
    if parameters is None and (length is None or own.get("rope_type") not in GROWING):
        return module  # type: ignore[no-any-return]
    config = copy.deepcopy(module.config)
    if parameters is not None:
        wanted = _over(own, parameters, trained or config.max_position_embeddings)
        # transformers' dynamic scaling counts from max_position_embeddings and from nothing else.
        config.max_position_embeddings = wanted.get(ORIGINAL, config.max_position_embeddings)
        width = 2 * module.inv_freq.numel()
        config.rope_parameters = to_transformers(wanted, width, config.max_position_embeddings)
        if PARTIAL in own:
            config.rope_parameters[PARTIAL] = own[PARTIAL]
    made: Any = type(module)(config).to(module.inv_freq.device)
    kind = config.rope_parameters["rope_type"]
    if kind in GROWING and length is not None:
        made.inv_freq, made.attention_scaling = ROPE_INIT_FUNCTIONS[kind](
            config, module.inv_freq.device, seq_len=length
        )
        # Under this name it leaves its frequencies alone.
        made.rope_type = "default"
    return made  # type: ignore[no-any-return]


def _over(own: Mapping[str, Any], parameters: Mapping[str, Any], trained: int | None) -> dict[str, Any]:
    """What is no matter of the scaling stays the model's: of two scalings' keys a mixture would mean nothing."""
    made = {**{key: own[key] for key in KEPT if key in own}, **parameters}
    counts = ORIGINAL in resolve("rope_scalings", str(made.get("rope_type", "default"))).keys
    if counts and trained is not None:
        made.setdefault(ORIGINAL, trained)
    return made
