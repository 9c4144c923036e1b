"""What evaluations ask of a model beyond its forward pass, and that models answer in different ways."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from clearhead.evals.probing.streams import Record
from clearhead.registry import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROWING = ("dynamic", "longrope")
"""Scalings of Hugging Face that depend on the length of the text."""
KEPT = ("rope_theta", "layout")
"""Keys of `rope_parameters` that every scaling of a model shares."""
ORIGINAL = "original_max_position_embeddings"


class ModelAdapter(ABC):
    """One model. Everything that is changed inside a context is as before when it ends."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    @abstractmethod
    def too_long(self, length: int) -> str | None:
        """Why the model cannot take `length` tokens, or None if it can."""

    def frequencies_depend_on_length(self, tried: Mapping[str, Any] | None = None) -> bool:
        """Whether rotary frequencies depend on the length of a text, under the scaling `tried` or the model's own.

        Then only texts of one length are read together, each batch settled for it: padding would count as text.
        """
        if tried is not None:
            return tried.get("rope_type") in GROWING
        parameters = self.model.config.to_dict().get("rope_parameters") or {}
        # One scaling, or one for each type of layer.
        kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
        return self.keys_depend_on_request() or any(part.get("rope_type") in GROWING for part in kinds)

    @abstractmethod
    def keys_depend_on_request(self) -> bool:
        """Whether inside `rescaled` a token's key still depends on how long its request is.

        Then keys of a shared beginning are not those of the whole prompts and cannot be read once for all of them.
        """

    @abstractmethod
    def rescaled(
        self, parameters: Mapping[str, Any] | None, *, trained: int | None, length: int | None
    ) -> AbstractContextManager[None]:
        """Inside, the model has another rotary scaling, or its own settled for one length: `probing.rescaling`."""

    @abstractmethod
    def recorded(self, record: Record) -> AbstractContextManager[None]:
        """Inside, every layer of every forward pass hands its streams to `record`: `probing.recorder`."""

    @abstractmethod
    def rounded_attention(self) -> AbstractContextManager[None]:
        """Inside, attention is written out and rounded by the scheme that is set: `probing.rounding`."""


def scaling_over(
    own: Mapping[str, Any], parameters: Mapping[str, Any], trained: int | None
) -> dict[str, Any]:
    """What is no matter of the scaling stays the model's: of two scalings' keys a mixture would mean nothing."""
    made = {**{key: own[key] for key in KEPT if key in own}, **parameters}
    counts = ORIGINAL in resolve("rope_scalings", str(made.get("rope_type", "default"))).keys
    if counts and trained is not None:
        made.setdefault(ORIGINAL, trained)
    return made
