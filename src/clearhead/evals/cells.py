"""Evaluations that are made of cells (lengths, depths, tasks, ...): what all of them do around one measurement.

Such an evaluation says which cells it has, how they are measured and what they make together. The loop here leaves out
a cell whose length the model cannot take, that does not fit into memory or whose measurement gives a reason (a
ValueError), keeps the reason beside the values, tells how far it is, and keeps on disk what is finished, so that an
interrupted evaluation goes on with the next part.

`CellEvaluation`: a cell is measured in one go, and its value kept. `SampleEvaluation`: a cell has samples (questions,
documents, ...) that are kept one by one; those of several cells may be answered together.
"""

from __future__ import annotations

import time
import zlib
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from pydantic import ValidationError

from clearhead.data.readers import CorpusError
from clearhead.data.store import TokenStore
from clearhead.evals.asking.answering import weights_digest
from clearhead.evals.asking.records import RecordError
from clearhead.evals.asking.running import batches
from clearhead.evals.asking.sample_log import SILENCE, Key, Row, SampleLog
from clearhead.evals.evaluation import C, Evaluation, EvaluationResult, R, Say
from clearhead.evals.finite import watched
from clearhead.evals.reasons import Unmeasured, all_of, reason_of
from clearhead.evals.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one value of a result is over; a subclass holds what its measurement needs.

    name: under which a reason is kept and a finished cell found again, so no two cells have the same.
    length: tokens that the model has to take at once, generated ones included.
    """

    name: str
    length: int | None = None


@dataclass(frozen=True)
class LeftOut:
    """What is not measured for a reason that is known beforehand; several may have one name."""

    name: str
    reason: str


K = TypeVar("K", bound=Cell)
V = TypeVar("V", bound=EvaluationResult)
M = TypeVar("M")
"""What the rows of a cell's samples make."""


@dataclass(frozen=True)
class Measured(Generic[K, M]):
    """The cells that have a value, in order, and why the others have none.

    rows: what the log holds, in the order in which it was measured, that of cells without a value too.
    progress: is told how far an evaluation is that does long work with the values.
    """

    pairs: list[tuple[K, M]]
    skipped: dict[str, str]
    rows: Sequence[Row] = ()
    progress: Say | None = None

    @property
    def values(self) -> list[M]:
        return [value for _, value in self.pairs]


@dataclass(frozen=True)
class Asked(Generic[K]):
    """Samples that are answered together, each with its cell, and why cells of theirs turn out to have no answer."""

    samples: Sequence[tuple[K, Key]]
    reasons: dict[str, str]

    @property
    def cells(self) -> list[K]:
        """Each cell once, without those that are left out by now."""
        found = {cell.name: cell for cell, _ in self.samples}
        return [cell for name, cell in found.items() if name not in self.reasons]

    def keys(self, cell: K) -> list[Key]:
        """The samples of one cell."""
        return [key for one, key in self.samples if one.name == cell.name]

    def leave_out(self, cell: K, reason: str) -> None:
        """Give up one cell; the others go on. An error that is raised gives up all that are not finished."""
        self.reasons[cell.name] = reason


class CellLoop(Evaluation[C, R], Generic[C, R, K, M]):
    """The loop around the samples of all cells, of which `CellEvaluation` and `SampleEvaluation` are the two uses.

    keys: the fields of a sample's row that tell it from the others.
    at_once: samples at most that are answered together.
    resumed: whether rows are kept on disk, in a file from which an interrupted run goes on. kept: whether it stays when
        all is measured. reopened: whether a file that has stayed is gone on with, too.
    """

    keys: ClassVar[tuple[str, ...]]
    at_once: ClassVar[int | None] = None
    resumed: ClassVar[bool] = True
    kept: ClassVar[bool] = True
    reopened: ClassVar[bool] = False

    @abstractmethod
    def cells(self, subject: Subject, config: C) -> Iterable[K | LeftOut]:
        """What is to be measured. Raises Unmeasured when nothing of it can be; another error is one of the options."""

    @abstractmethod
    def samples(self, config: C, cell: K) -> Iterable[Key]:
        """The values of `keys` of each of a cell's samples."""

    @abstractmethod
    def ask(self, subject: Subject, config: C, asked: Asked[K]) -> Generator[Row, None, None]:
        """The rows of samples, in any order, and others that are kept beside them; each is kept as soon as it is given.

        Raises ValueError with the reason why the cells that are not finished by then cannot be.
        """

    @abstractmethod
    def value(self, cell: K, rows: list[Row]) -> M:
        """What a cell's rows, in the order of its samples, make."""

    @abstractmethod
    def gather(self, subject: Subject, config: C, measured: Measured[K, M]) -> R:
        """The result of at least one cell. Raises Unmeasured when the cells that are there make none."""

    @abstractmethod
    def about(self, subject: Subject, config: C, cells: Sequence[K]) -> dict[str, Any]:
        """Options and data, as JSON values: rows of earlier runs count only with the same, and the same weights."""

    def file(self) -> str:
        """The name of the file of rows, without its ending."""
        return self.name

    def together(
        self, subject: Subject, config: C, samples: Sequence[tuple[K, Key]]
    ) -> Iterable[Sequence[tuple[K, Key]]]:
        """The samples that are still to be answered, in the order of their cells, as they are asked together."""
        return grouped(samples, lambda cell, key: cell.name).values()

    def is_reason(self, error: Exception) -> bool:
        """Whether an error is a reason to leave out what was asked, and not one that ends the evaluation."""
        # Files that cannot be used are no property of the model, nor is a mistake in an evaluation.
        if isinstance(error, CorpusError | RecordError | ValidationError):
            return False
        return isinstance(error, ValueError | torch.OutOfMemoryError | MemoryError)

    def why(self, skipped: Mapping[str, str]) -> str:
        """The reason of the whole evaluation when no cell has a value."""
        return all_of(skipped)

    def result(self, subject: Subject, config: C, progress: Say | None = None) -> R:
        planned = list(self.cells(subject, config))
        reasons: dict[str, str] = {}
        cells: list[K] = []
        for one in planned:
            if isinstance(one, LeftOut):
                reasons[one.name] = one.reason
            elif one.length is not None and (reason := subject.too_long(one.length)):
                reasons[one.name] = reason
            else:
                cells.append(one)
        if not cells:
            raise Unmeasured(self.why(reasons))
        with self._log(subject, config, cells) as log:
            reasons |= self._ask_all(subject, config, cells, log, progress)
            pairs = [
                (cell, self.value(cell, log.of(self.samples(config, cell))))
                for cell in cells
                if cell.name not in reasons
            ]
            in_order = {one.name: reasons[one.name] for one in planned if one.name in reasons}
            measured = Measured(pairs, in_order, log.records, progress)
            # Whatever goes wrong from here on, the next run has the rows; a reason is an end like any other.
            try:
                if pairs:
                    return self.gather(subject, config, measured)
                unmeasured = Unmeasured(self.why(in_order))
            except Unmeasured as error:
                unmeasured = error
        raise unmeasured

    def _ask_all(
        self, subject: Subject, config: C, cells: Sequence[K], log: SampleLog, progress: Say | None
    ) -> dict[str, str]:
        """Has all answered that `log` does not have; why cells of it could not be."""
        reasons: dict[str, str] = {}
        keys = {cell.name: list(self.samples(config, cell)) for cell in cells}
        left = [(cell, key) for cell in cells for key in keys[cell.name] if not log.has(key)]
        pace = Pace(self.name, sum(map(len, keys.values())), len(left), progress)
        for group in self.together(subject, config, left):
            for span in batches(len(group), self.at_once or len(group)):
                asked = Asked([group[i] for i in span if group[i][0].name not in reasons], reasons)
                try:
                    self._ask(subject, config, asked, log, pace)
                except Exception as error:
                    if not self.is_reason(error):
                        raise
                    for cell in asked.cells:
                        if not all(map(log.has, keys[cell.name])):
                            asked.leave_out(cell, reason_of(error))
                pace.left -= len(span)
        return reasons

    def _ask(self, subject: Subject, config: C, asked: Asked[K], log: SampleLog, pace: Pace) -> None:
        if not asked.samples:
            return
        with (
            nullcontext() if log.path is None else watched(subject.model) as watch,
            closing(self.ask(subject, config, asked)) as rows,
        ):
            wanted, done = {key for _, key in asked.samples}, 0
            pace.tell(asked.samples[0][0], done)
            for row in rows:
                if log.has(log.key(row)):
                    continue
                # Kept on disk, it would hide from the next process that the logits were no numbers.
                log.add(row, lasting=watch is None or watch.reason is None or self.tells_overflow)
                done += log.key(row) in wanted
                if done < len(wanted):
                    pace.tell(asked.samples[done][0], done)

    def _log(self, subject: Subject, config: C, cells: Sequence[K]) -> SampleLog:
        """What an interrupted run with the same options, weights and data has finished."""
        if subject.folder is None or not self.resumed:
            return SampleLog.open(None, self.name, {}, self.keys)
        about = {**self.about(subject, config, cells), "weights": weights_digest(subject.model)}
        return SampleLog.open(
            subject.folder, self.file(), about, self.keys, kept=self.kept, reopened=self.reopened
        )


class Pace:
    """Says now and then how far an evaluation is. left: samples that are still to be answered."""

    def __init__(self, name: str, total: int, left: int, say: Say | None) -> None:
        self.name, self.total, self.left, self.say = name, total, left, say
        self.said = time.monotonic()

    def tell(self, cell: Cell, more: int) -> None:
        """Before the next sample, of `cell`, with `more` answered than `left` says."""
        if self.say is not None and time.monotonic() - self.said > SILENCE:
            self.said = time.monotonic()
            done = self.total - self.left + more
            self.say(f"{self.name}: {done} of {self.total} parts, next {cell.name}")


class CellEvaluation(CellLoop[C, R, K, V]):
    """An evaluation whose cells are measured in one go. Value: what a measured cell gives."""

    Value: type[V]
    keys = ("cell",)
    kept = False

    @abstractmethod
    def measure(self, subject: Subject, config: C, cell: K) -> V:
        """One cell. Raises ValueError with the reason when it cannot be measured."""

    def text(self, subject: Subject, config: C) -> TokenStore | None:
        """The text that values depend on: finished cells count only with the same. None for none."""
        return subject.documents

    def file(self) -> str:
        return f"{self.name}.cells"

    def about(self, subject: Subject, config: C, cells: Sequence[K]) -> dict[str, Any]:
        store = self.text(subject, config)
        return {
            "config": config.model_dump(mode="json"),
            "text": None if store is None else fingerprint(store),
        }

    def samples(self, config: C, cell: K) -> Iterable[Key]:
        return [(cell.name,)]

    def ask(self, subject: Subject, config: C, asked: Asked[K]) -> Generator[Row, None, None]:
        for cell in asked.cells:
            yield {"cell": cell.name, "value": self.measure(subject, config, cell).values()}

    def value(self, cell: K, rows: list[Row]) -> V:
        return self.Value.model_validate(rows[0]["value"])

    def _log(self, subject: Subject, config: C, cells: Sequence[K]) -> SampleLog:
        # A text that cannot be opened is an error of its own, not the reason of every cell.
        self.text(subject, config)
        return super()._log(subject, config, cells)


class SampleEvaluation(CellLoop[C, R, K, list[Row]]):
    """An evaluation whose cells have samples: `gather` gets the rows of each cell, in the order of its samples."""

    def value(self, cell: K, rows: list[Row]) -> list[Row]:
        return rows


@dataclass(frozen=True, kw_only=True)
class TextLength(Cell):
    """Texts of `tokens` tokens."""

    tokens: int


class LengthEvaluation(CellEvaluation[C, R, TextLength, R]):
    """An evaluation of texts of one length: its one cell gives the whole result."""

    # There is no second cell to go on with.
    resumed = False

    def value(self, cell: TextLength, rows: list[Row]) -> R:
        return self.Result.model_validate(rows[0]["value"])

    @abstractmethod
    def length(self, subject: Subject, config: C) -> int:
        """Tokens of a text. Raises Unmeasured as `cells`."""

    def cells(self, subject: Subject, config: C) -> Iterable[TextLength]:
        length = self.length(subject, config)
        return [TextLength(name=f"{length} tokens", length=length, tokens=length)]

    def gather(self, subject: Subject, config: C, measured: Measured[TextLength, R]) -> R:
        return measured.values[0]


def fingerprint(store: TokenStore) -> str:
    """Tells one text from another."""
    sums = [zlib.crc32(np.ascontiguousarray(part).tobytes()) for part in (store.tokens, store.offsets)]
    return " ".join(f"{one:08x}" for one in sums)


T = TypeVar("T")


def grouped(samples: Iterable[tuple[K, Key]], kind: Callable[[K, Key], T]) -> dict[T, list[tuple[K, Key]]]:
    """Samples by what `kind` gives of (cell, key), the kinds in the order in which they come first."""
    found: dict[T, list[tuple[K, Key]]] = {}
    for cell, key in samples:
        found.setdefault(kind(cell, key), []).append((cell, key))
    return found
