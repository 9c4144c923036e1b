"""What is evaluated: a model with everything that an evaluation may look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clearhead.data.packing import Example
from clearhead.data.retrieval import NeedleRange
from clearhead.evals.finite import broken_weights
from clearhead.evals.probing.adapter import ModelAdapter, adapter_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from clearhead.data.needles import NeedleTokenizer
    from clearhead.data.store import TokenStore


@dataclass(frozen=True)
class Subject:
    """A trained model and everything an evaluation may look at.

    open_documents: the text to evaluate on as tokens, opened when an evaluation first asks for `documents`.
    untrained: makes the same model freshly initialised, for levels that only a measurement tells.
    seed: the seed of the training run. Samples are drawn from the evaluation's own seed, never from this one, so that
    all arms and seeds are asked the same questions.
    training_length: tokens per training row; of a model that was not trained here the length its configuration names.
    external: not trained here, so nothing is known of its training but what its configuration says.
    needles: the retrieval documents of training, whose sentences and sizes of keys and values questions keep to.
    metrics: the records of the run's `metrics.jsonl`; budget: its training budget in tokens.
    task: what the model was trained for (`models.tasks`). held_out: at most so many rows like those of its training
        that it has not seen; labels: what the numbers of their labels stand for.
    folder: where an evaluation may keep files of its own beside the results; None keeps nothing.
    """

    model: PreTrainedModel
    tokenizer: NeedleTokenizer
    open_documents: Callable[[], TokenStore]
    device: torch.device
    untrained: Callable[[], PreTrainedModel]
    seed: int
    training_length: int | None = None
    external: bool = False
    needles: NeedleRange = field(default_factory=NeedleRange)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    budget: int | None = None
    task: str = "causal"
    held_out: Callable[[int], list[Example]] = lambda count: []
    labels: Sequence[str] = ()
    folder: Path | None = None
    _texts: dict[tuple[str, ...], TokenStore] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def broken(self) -> str | None:
        """Why nothing that is measured of the model means anything; None if its weights are numbers."""
        return broken_weights(self.model)

    @cached_property
    def documents(self) -> TokenStore:
        """Text that the model was not trained on: the validation documents of a run, or a corpus named for it."""
        return self.open_documents()

    def texts(self, sources: Sequence[str] | None) -> TokenStore:
        """The documents of `sources`, read by `texts.open_texts`, or `documents` without.

        What was read is kept: an evaluation may ask for it many times.
        """
        if not sources:
            return self.documents
        key = tuple(sources)
        if key not in self._texts:
            from clearhead.evals.asking.texts import open_texts

            tokenizer: Any = self.tokenizer
            self._texts[key] = open_texts(sources, tokenizer)
        return self._texts[key]

    @property
    def adapter(self) -> ModelAdapter:
        """What differs between a model of this library and any other."""
        return adapter_of(self.model)

    def too_long(self, length: int) -> str | None:
        """Why the model cannot take `length` tokens, or `None` if it can."""
        return self.adapter.too_long(length)


def lengths_past_training(subject: Subject, lengths: list[int] | None) -> list[int]:
    """`lengths` in order, or 1, 2, 4, 8 and 16 times the training length (256 where it is not known)."""
    trained = subject.training_length or 256
    return sorted(set(lengths or [trained * multiple for multiple in (1, 2, 4, 8, 16)]))
