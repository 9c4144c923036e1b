"""Bits per masked byte by the length of the window, past the training length too.

The same documents, all at least as long as the longest window, with the same tokens hidden, are read in windows of each
length: what changes with the length is how much text stands around a hidden token, on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from pydantic import Field

from clearhead.analysis.by_length import first_values, left_out, length_chart, length_table, shared_lengths
from clearhead.analysis.comparison import Comparison, compare
from clearhead.analysis.sections import Section
from clearhead.evals.asking.masked import MaskConfig, guess, hide
from clearhead.evals.asking.texts import choose
from clearhead.evals.cells import CellEvaluation, Measured, TextLength
from clearhead.evals.evaluation import EvaluationResult
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults


class MaskedByLengthConfig(MaskConfig):
    """lengths: of windows in tokens (default: 1, 2, 4 and 8 times the training length). The rest: `MaskConfig`.

    max_tokens is at least the longest window.
    """

    lengths: list[int] | None = None
    max_documents: int = Field(default=50, ge=1)


class MaskedLength(EvaluationResult):
    """bits: of the hidden tokens of each document, read in windows of `length` tokens."""

    length: int
    bits: list[float]


class MaskedByLengthResult(EvaluationResult):
    """bytes: of the hidden tokens of each document, the same at every length."""

    cells: list[MaskedLength]
    skipped_cells: dict[str, str] = Field(default_factory=dict)
    n: int
    tokens: int
    documents: list[str]
    bytes: list[float]


class MaskedByLength(CellEvaluation[MaskedByLengthConfig, MaskedByLengthResult, TextLength, MaskedLength]):
    name = "masked_by_length"
    tasks = ("masked",)
    Config = MaskedByLengthConfig
    Result = MaskedByLengthResult
    Value = MaskedLength

    def cells(self, subject: Subject, config: MaskedByLengthConfig) -> Iterable[TextLength]:
        lengths = self._lengths(subject, config)
        self._chosen(subject, config)
        return [TextLength(name=str(length), length=length, tokens=length) for length in lengths]

    def _lengths(self, subject: Subject, config: MaskedByLengthConfig) -> list[int]:
        trained = subject.training_length or 256
        lengths = sorted(set(config.lengths or [trained * times for times in (1, 2, 4, 8)]))
        if lengths[0] < 4:
            raise ValueError(f"lengths must be at least 4, got {lengths[0]}")
        return lengths

    def _chosen(self, subject: Subject, config: MaskedByLengthConfig) -> list[int]:
        """Documents that fill the longest window. Raises Unmeasured for fewer than two."""
        longest = self._lengths(subject, config)[-1]
        enough = np.flatnonzero(np.diff(subject.documents.offsets) >= longest).tolist()
        if len(enough) < 2:
            raise Unmeasured(
                f"only {len(enough)} documents have {longest} tokens, at least 2 are needed; "
                f"lower evaluate.{self.name}.lengths"
            )
        return [enough[i] for i in choose(len(enough), config.max_documents, config.seed)]

    def _widened(self, subject: Subject, config: MaskedByLengthConfig) -> MaskedByLengthConfig:
        longest = self._lengths(subject, config)[-1]
        return config.model_copy(update={"max_tokens": max(config.max_tokens, longest)})

    def measure(self, subject: Subject, config: MaskedByLengthConfig, cell: TextLength) -> MaskedLength:
        documents = hide(subject, self._chosen(subject, config), self._widened(subject, config))
        found = guess(subject, documents, cell.tokens, config.batch_tokens)
        return MaskedLength(length=cell.tokens, bits=[round(float(value), 4) for value in found.bits])

    def gather(
        self, subject: Subject, config: MaskedByLengthConfig, measured: Measured[TextLength, MaskedLength]
    ) -> MaskedByLengthResult:
        chosen = self._chosen(subject, config)
        documents = hide(subject, chosen, self._widened(subject, config))
        return MaskedByLengthResult(
            cells=measured.values,
            skipped_cells=measured.skipped,
            n=len(documents),
            tokens=sum(int((document.labels >= 0).sum()) for document in documents),
            documents=[subject.documents.ids[i] for i in chosen],
            bytes=[round(document.bytes, 3) for document in documents],
        )

    def section(self, run: RunResults) -> Section:
        title, question = (
            "Masked language modelling by length",
            "Does more text around a hidden token help it?",
        )
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first, trained = first_values(values), run.training_length
        lengths = shared_lengths(values, lambda v: {cell.length for cell in v.cells})
        found: dict[int, Comparison] = {
            length: compare(
                {
                    arm: {
                        seed: next(cell.bits for cell in v.cells if cell.length == length)
                        for seed, v in seeds.items()
                    }
                    for arm, seeds in values.items()
                },
                "lower",
                denominators=first.bytes,
                digits=3,
            )
            for length in lengths
        }
        if not found:
            return self.missing(run, title, question)
        arms, longest = list(values), lengths[-1]
        chart = length_chart(
            "masked-by-length", title, "bits per masked byte", arms, lengths,
            lambda arm, length: found[length].estimates[arm], trained=trained,
            caption="The same hidden tokens at every length. Bands: bootstrap over documents, Student's t over seeds.",
        )  # fmt: skip
        table = length_table(
            "Bits per masked byte", arms, lengths, lambda arm, length: found[length].estimates[arm].text(3)
        )
        return Section(
            self.name,
            title,
            question,
            f"At {longest:,} tokens: {found[longest].sentence()}",
            measure=f"bits per masked byte at {longest:,} tokens ↓",
            digits=3,
            headlines=found[longest].headlines(),
            charts=[chart],
            tables=[table],
            notes=[
                f"{first.n} validation documents of at least {longest:,} tokens, {first.tokens:,} hidden tokens; a "
                "document is read in windows of each length that do not overlap.",
                *left_out(values, " tokens"),
                *run.skipped(self.name),
            ],
        )
