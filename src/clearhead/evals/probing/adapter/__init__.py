"""A model of this library or any other, behind one interface: the only place that asks which of them it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clearhead.evals.probing.adapter.base import ModelAdapter
from clearhead.evals.probing.adapter.hugging_face import HuggingFaceModel
from clearhead.evals.probing.adapter.own import OwnModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["HuggingFaceModel", "ModelAdapter", "OwnModel", "adapter_of"]


def adapter_of(model: PreTrainedModel) -> ModelAdapter:
    """What an evaluation has to know of `model` beyond what every model of its kind can do."""
    from clearhead.models.autoload import FAMILIES

    ours = model.config.to_dict().get("model_type") in FAMILIES
    return OwnModel(model) if ours else HuggingFaceModel(model)
