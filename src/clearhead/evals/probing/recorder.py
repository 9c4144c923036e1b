"""Looking at queries and keys while a model reads."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from clearhead.evals.probing.adapter import adapter_of
from clearhead.evals.probing.streams import Record, Recorded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Record", "Recorded", "recorded"]


def recorded(model: PreTrainedModel, record: Record) -> AbstractContextManager[None]:
    """Inside, every layer of every forward pass hands its streams to `record`; the model computes what it did.

    Raises ValueError for a model whose attention cannot be listened to.
    """
    return adapter_of(model).recorded(record)
