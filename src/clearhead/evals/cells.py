"""Evaluations that are made of cells (lengths, depths, forms, ...): what all of them do around one measurement.

Such an evaluation says which cells it has, how one is measured and what they make together. The loop here leaves out a
cell whose length the model cannot take, that does not fit into memory or whose measurement gives a reason (a
ValueError), keeps the reason beside the values, tells how far it is, and keeps every finished cell on disk, so that an
interrupted evaluation goes on with the next one.
"""

from __future__ import annotations

import time
import zlib
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from pydantic import ValidationError

from clearhead.data.readers import CorpusError
from clearhead.data.store import TokenStore
from clearhead.evals.asking.answering import weights_digest
from clearhead.evals.asking.records import RecordError
from clearhead.evals.asking.sample_log import SILENCE, SampleLog
from clearhead.evals.evaluation import C, Evaluation, EvaluationResult, R, Say
from clearhead.evals.finite import watched
from clearhead.evals.reasons import Unmeasured, all_of, reason_of, unless
from clearhead.evals.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one value of a result is over; a subclass holds what its measurement needs.

    name: under which a reason is kept and a finished cell found again, so no two cells have the same.
    length: tokens that the model has to take at once, generated ones included.
    reason: why it cannot be measured, where that is known beforehand.
    """

    name: str
    length: int | None = None
    reason: str | None = None


K = TypeVar("K", bound=Cell)
V = TypeVar("V", bound=EvaluationResult)


@dataclass(frozen=True)
class Measured(Generic[K, V]):
    """The cells that have a value, in order, and why the others have none."""

    pairs: list[tuple[K, V]]
    skipped: dict[str, str]

    @property
    def values(self) -> list[V]:
        return [value for _, value in self.pairs]


class CellEvaluation(Evaluation[C, R], Generic[C, R, K, V]):
    """An evaluation of cells. Value: what a measured cell gives."""

    Value: type[V]

    @abstractmethod
    def cells(self, subject: Subject, config: C) -> Iterable[K]:
        """What is to be measured. Raises Unmeasured when nothing of it can be; another error is one of the options."""

    @abstractmethod
    def measure(self, subject: Subject, config: C, cell: K) -> V:
        """One cell. Raises ValueError with the reason when it cannot be measured."""

    @abstractmethod
    def gather(self, subject: Subject, config: C, measured: Measured[K, V]) -> R:
        """The result of at least one cell. Raises Unmeasured when the cells that are there make none."""

    def text(self, subject: Subject, config: C) -> TokenStore | None:
        """The text that values depend on: finished cells count only with the same. None for none."""
        return subject.documents

    def result(self, subject: Subject, config: C, progress: Say | None = None) -> R:
        cells = list(self.cells(subject, config))
        # A text that cannot be opened is an error of its own, not the reason of every cell.
        if any(self._reason(subject, cell) is None for cell in cells):
            self.text(subject, config)
        measured: Measured[K, V] = Measured([], {})
        said = time.monotonic()
        with self._log(subject, config) as log:
            done = {record["cell"]: record["value"] for record in log.records}
            for number, cell in enumerate(cells):
                if progress is not None and time.monotonic() - said > SILENCE:
                    said = time.monotonic()
                    progress(f"{self.name}: {number} of {len(cells)} parts, next {cell.name}")
                if cell.name in done:
                    measured.pairs.append((cell, self.Value.model_validate(done[cell.name])))
                    continue
                try:
                    value = self._measured(subject, config, cell, log)
                except (CorpusError, RecordError, ValidationError):
                    # Files that cannot be used are no property of the model, nor is a mistake in an evaluation.
                    raise
                except (ValueError, torch.OutOfMemoryError, MemoryError) as error:
                    measured.skipped[cell.name] = reason_of(error)
                    continue
                measured.pairs.append((cell, value))
            # Whatever goes wrong from here on, the next run has the cells; a reason is an end like any other.
            try:
                return self._gathered(subject, config, measured)
            except Unmeasured as error:
                reason = error
        raise reason

    def _gathered(self, subject: Subject, config: C, measured: Measured[K, V]) -> R:
        if not measured.pairs:
            raise Unmeasured(all_of(measured.skipped))
        return self.gather(subject, config, measured)

    def _reason(self, subject: Subject, cell: K) -> str | None:
        if cell.reason is not None or cell.length is None:
            return cell.reason
        return subject.too_long(cell.length)

    def _measured(self, subject: Subject, config: C, cell: K, log: SampleLog) -> V:
        unless(self._reason(subject, cell))
        if log.path is None:
            return self.measure(subject, config, cell)
        with watched(subject.model) as watch:
            value = self.measure(subject, config, cell)
        # Kept on disk, it would hide from the next process that the logits were no numbers.
        if watch.reason is None or self.tells_overflow:
            log.add({"cell": cell.name, "value": value.values()})
        return value

    def _log(self, subject: Subject, config: C) -> SampleLog:
        """Finished cells of an interrupted run with the same options, weights and text."""
        about: dict[str, Any] = {}
        if subject.folder is not None:
            store = self.text(subject, config)
            about = {
                "config": config.model_dump(mode="json"),
                "weights": weights_digest(subject.model),
                "text": None if store is None else fingerprint(store),
            }
        name = f"{self.name}.cells"
        return SampleLog.open(subject.folder, name, about, ("cell",), kept=False)


@dataclass(frozen=True, kw_only=True)
class TextLength(Cell):
    """Texts of `tokens` tokens."""

    tokens: int


class LengthEvaluation(CellEvaluation[C, R, TextLength, R]):
    """An evaluation of texts of one length: its one cell gives the whole result."""

    @abstractmethod
    def length(self, subject: Subject, config: C) -> int:
        """Tokens of a text. Raises Unmeasured as `cells`."""

    def cells(self, subject: Subject, config: C) -> Iterable[TextLength]:
        length = self.length(subject, config)
        return [TextLength(name=f"{length} tokens", length=length, tokens=length)]

    def gather(self, subject: Subject, config: C, measured: Measured[TextLength, R]) -> R:
        return measured.values[0]

    def _log(self, subject: Subject, config: C) -> SampleLog:
        # There is no second cell to go on with.
        return SampleLog.open(None, self.name, {}, ("cell",))


def fingerprint(store: TokenStore) -> str:
    """Tells one text from another."""
    sums = [zlib.crc32(np.ascontiguousarray(part).tobytes()) for part in (store.tokens, store.offsets)]
    return " ".join(f"{one:08x}" for one in sums)
