"""What an evaluation is: its options, how it measures a trained model, and its section of the report.

One evaluation is one file with a subclass of :class:`Evaluation` and one line in ``registry.EVALUATIONS``. ``run``
returns plain JSON values; ``section`` reads the values of all arms and seeds back from disk. The two never meet in
memory, so a report can be made on another machine, long after, from the files alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from clearhead.data.retrieval import NeedleRange
from clearhead.evals.finite import broken_weights
from clearhead.evals.results import ArmResults, RunResults, SeedResults, load_run
from clearhead.evals.sections import (
    BarChart,
    BarSeries,
    Chart,
    Headline,
    HeatMap,
    LineChart,
    Panel,
    Reference,
    Section,
    Series,
    Table,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from clearhead.data.needles import Tokenizer
    from clearhead.data.store import TokenStore

__all__ = [
    "ArmResults",
    "BarChart",
    "BarSeries",
    "Chart",
    "Evaluation",
    "EvaluationConfig",
    "Headline",
    "HeatMap",
    "LineChart",
    "Panel",
    "Reference",
    "RunResults",
    "Section",
    "SeedResults",
    "Series",
    "Subject",
    "Table",
    "load_run",
]


NEEDS_FAST = "the prompts need a tokenizer with a tokenizer.json, which knows where its tokens lie"
"""Why an evaluation that cuts texts at exact tokens skips a model."""


class EvaluationConfig(BaseModel):
    """Base of an evaluation's options: unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=EvaluationConfig)


@dataclass(frozen=True)
class Subject:
    """A trained model and everything an evaluation may look at.

    open_documents: the text to evaluate on as tokens, opened when an evaluation first asks for ``documents``.
    untrained: makes the same model freshly initialised, for levels that only a measurement tells.
    seed: the seed of the training run. Samples are drawn from the evaluation's own seed, never from this one, so that
    all arms and seeds are asked the same questions.
    training_length: tokens per training row; of a model that was not trained here the length its configuration names.
    foreign: not trained here, so nothing is known of its training but what its configuration says.
    needles: the retrieval documents of training, whose sentences and sizes of keys and values questions keep to.
    metrics: the records of the run's ``metrics.jsonl``; budget: its training budget in tokens.
    folder: where an evaluation may keep files of its own beside the results; None keeps nothing.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    open_documents: Callable[[], TokenStore]
    device: torch.device
    untrained: Callable[[], PreTrainedModel]
    seed: int
    training_length: int | None = None
    foreign: bool = False
    needles: NeedleRange = field(default_factory=NeedleRange)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    budget: int | None = None
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
        """The documents of ``sources``, read by :func:`clearhead.evals.texts.open_texts`, or ``documents`` without.

        What was read is kept: an evaluation may ask for it many times.
        """
        if not sources:
            return self.documents
        key = tuple(sources)
        if key not in self._texts:
            from clearhead.evals.texts import open_texts

            tokenizer: Any = self.tokenizer
            self._texts[key] = open_texts(sources, tokenizer)
        return self._texts[key]

    def too_long(self, length: int) -> str | None:
        """Why the model cannot take ``length`` tokens, or ``None`` if it can.

        Positions that are computed (rotary ones, ALiBi, none) have no end; a table of learned positions has one.
        """
        config = self.model.config
        known = config.to_dict()
        if known.get("model_type") == "clearhead" or known.get("rope_parameters"):
            return None
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            return f"{length} tokens is more than the model takes (max_position_embeddings = {limit})"
        return None


class Evaluation(ABC, Generic[C]):
    """One measurement. ``name`` is its key in the registry and in ``[evaluate.<name>]`` of a recipe."""

    name: ClassVar[str]
    Config: type[C]
    tells_overflow: ClassVar[bool] = False
    """Whether its values say themselves where the model's logits were no numbers."""

    @abstractmethod
    def run(self, subject: Subject, config: C) -> dict[str, Any]:
        """Measure one trained model. Returns JSON values; ``{"skipped": reason}`` when it cannot be measured."""

    @abstractmethod
    def section(self, run: RunResults) -> Section:
        """The report's section from the values of all arms and seeds; missing ones are shown as missing."""

    def remark(self, values: dict[str, Any]) -> str:
        """A line for the terminal about what was measured, such as what it has cost; empty where there is none."""
        return ""

    def missing(self, run: RunResults, title: str, question: str) -> Section:
        """The section of an evaluation that has no values at all, with the reason when there is one."""
        reasons = run.skipped(self.name)
        answer = "Not measured: " + "; ".join(reasons) + "." if reasons else "No results yet."
        return Section(self.name, title, question, answer, missing=True)


def lengths_past_training(subject: Subject, lengths: list[int] | None) -> list[int]:
    """``lengths`` in order, or 1, 2, 4, 8 and 16 times the training length (256 where it is not known)."""
    trained = subject.training_length or 256
    return sorted(set(lengths or [trained * multiple for multiple in (1, 2, 4, 8, 16)]))


def reason_of(error: Exception) -> str:
    """The first line of what an error says, as the reason why something was not measured."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def inference(model: PreTrainedModel, implementation: str | None = None) -> Iterator[None]:
    """No gradients, eval mode, optionally another attention implementation; all restored afterwards."""
    training = model.training
    previous = str(model.config._attn_implementation)
    model.eval()
    if implementation is not None:
        model.set_attn_implementation(implementation)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
        if implementation is not None:
            model.set_attn_implementation(previous)


def token_losses(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Negative log-likelihood in nats of every token given those before it: (B, L) -> (B, L - 1), float32."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    ).view(input_ids.shape[0], -1)


def to_batch(rows: list[NDArray[np.int64]], device: torch.device) -> Tensor:
    """Rows of ids, padded with 0 on the right to the longest: under a causal mask that changes nothing before it."""
    longest = max(len(row) for row in rows)
    batch = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        batch[index, : len(row)] = row
    return torch.from_numpy(batch).to(device)


def batches(count: int, size: int) -> Iterator[range]:
    """Index ranges of at most ``size`` that cover ``range(count)``."""
    for start in range(0, count, max(1, size)):
        yield range(start, min(start + max(1, size), count))
